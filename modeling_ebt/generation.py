"""Thinking in `generate()`: options resolved once, energies of every token carried out."""

import functools
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerationMixin
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.utils import logging

from .pretrained import own_class
from .thinking_ebt import FLAT_PREFIX, FLAT_THINKING_NAMES, ThinkingConfig


logger = logging.get_logger(__name__)


@dataclass
class EBTGenerateOutput(GenerateDecoderOnlyOutput):
    """
    [`~generation.GenerateDecoderOnlyOutput`] with the thinking.

    Args:
        energies (`torch.FloatTensor` of shape `(B, new, K + 1)`): energy of each token's candidate before every step
            and after the last; NaN after the end of a row.
        steps_taken (`torch.LongTensor` of shape `(B, new)`): steps that moved it.
    """

    energies: Tensor | None = None
    steps_taken: Tensor | None = None


@dataclass
class EBTGenerateBeamOutput(GenerateBeamDecoderOnlyOutput):
    """As [`EBTGenerateOutput`], for beam search: energies along each returned beam, NaN after its end."""

    energies: Tensor | None = None
    steps_taken: Tensor | None = None


@dataclass
class _Trace:
    """What one running generate() call thought: energies and steps of every token, and which rows it ended."""

    energies: list[Tensor] = field(default_factory=list)
    steps_taken: list[Tensor] = field(default_factory=list)
    ended: list[Tensor] = field(default_factory=list)


NO_CONTINUOUS_BATCHING = (
    "Energy-based models cannot use continuous batching: its pages hide the context from the candidates. Use "
    "`generate()` with a padded batch of prompts (`tokenizer(prompts, padding=True, padding_side='left')`)."
)


@dataclass
class _Account:
    """
    What is remembered from token to token of a running generate() call.

    Args:
        spent (`Tensor`, *optional*): what each row (beam) has used up of its `thinking_budget`.
        constants (`dict`): what is the same for all tokens.
    """

    spent: Tensor | None = None
    constants: dict[Any, Any] = field(default_factory=dict)


# context variables keep threads apart
_TRACE: ContextVar[_Trace | None] = ContextVar("ebt_thinking_trace", default=None)
_ACCOUNT: ContextVar[_Account | None] = ContextVar("ebt_thinking_account", default=None)


def once_per_generation(key: Any, make: Callable[[], Tensor]) -> Tensor | None:
    """What `make` gives, made once for all tokens of a running generate() call (weights rest); None outside of one."""
    account = _ACCOUNT.get()
    if account is None:
        return None
    if key not in account.constants:
        account.constants[key] = make()
    return account.constants[key]


def configured_thinking(config: Any) -> ThinkingConfig:
    """What the `thinking_*` attributes of a generation config say."""
    set_there = {name: value for name, value in vars(config).items() if name.startswith(FLAT_PREFIX)}
    return ThinkingConfig.from_value({name: value for name, value in set_there.items() if value is not None})


class _TracedCriteria(StoppingCriteriaList):
    """Stopping criteria that leave in the trace which rows they ended."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        ended = super().__call__(*args, **kwargs)
        trace = _TRACE.get()
        if trace is not None:
            trace.ended.append(ended)
        return ended


class EBTGenerationMixin(GenerationMixin):
    """What an energy-based model adds to [`GenerationMixin`]; every decoding mode is still transformers' own."""

    def generate(self, *args: Any, output_energies: bool | None = None, **kwargs: Any) -> Any:
        """
        [`GenerationMixin.generate`] with thinking. Takes everything that one takes, and:

        Args:
            thinking ([`ThinkingConfig`] or `dict`, *optional*): how to think about every token.
            thinking_steps, thinking_candidates, ... (*optional*): its fields, flat; they win over `thinking`.
            output_energies (`bool`, *optional*): with `return_dict_in_generate=True`, return `energies` and
                `steps_taken` of every generated token.

        The order of precedence is this call, the `thinking_*` attributes of the generation config, the model config.

        Raises:
            ValueError: for options that are unknown or out of range, and for `output_energies` and `thinking_budget`
                in a decoding mode that proposes several tokens at once.
        """
        token = _ACCOUNT.set(_Account())
        try:
            return self._generate(*args, output_energies=output_energies, **kwargs)
        finally:
            _ACCOUNT.reset(token)

    def _generate(self, *args: Any, output_energies: bool | None = None, **kwargs: Any) -> Any:
        generation_config = kwargs.get("generation_config")
        if generation_config is None and len(args) > 1:
            generation_config = args[1]
        configured = [config for config in (generation_config, self.generation_config) if config is not None]
        kwargs["thinking"] = self._call_thinking(kwargs, configured)
        looked_up = [kwargs, *(vars(config) for config in configured)]
        assisted = kwargs.get("assistant_model") is not None or any(
            options.get("prompt_lookup_num_tokens") for options in looked_up
        )
        if kwargs["thinking"].budget and assisted:
            raise ValueError("`thinking_budget` is not available with assisted decoding, which takes tokens back.")
        if not output_energies:
            return super().generate(*args, **kwargs)
        returns_dict = kwargs.get("return_dict_in_generate")
        for config in configured:
            if returns_dict is None:
                returns_dict = getattr(config, "return_dict_in_generate", None)
        if not returns_dict:
            raise ValueError("`output_energies=True` needs `return_dict_in_generate=True` to have somewhere to go.")
        if assisted:
            raise ValueError("`output_energies=True` is not available with assisted decoding, which skips tokens.")
        trace = _Trace()
        token = _TRACE.set(trace)
        try:
            output = super().generate(*args, output_energies=True, **kwargs)
        finally:
            _TRACE.reset(token)
        return self._with_energies(output, trace)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """
        [`PreTrainedModel.save_pretrained`], with the `thinking_*` attributes of the generation config, and so that
        `transformers serve --trust-remote-code` can load what is saved.
        """
        if self.generation_config is not None:
            # a mark of configs never touched by a user; loading drops all but the standard attributes of those
            self.generation_config._from_model_config = False
        if self._auto_class is not None:  # the model is saved with its code
            # the one Auto class that `transformers serve` asks; any other model must be a part of transformers there
            owner = own_class(self)
            served = {"AutoModelForDecision": f"{owner.__module__.rpartition('.')[2]}.{owner.__name__}"}
            self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **served}
        super().save_pretrained(*args, **kwargs)

    @property
    def init_continuous_batching(self) -> Any:
        """Absent, unlike in other models: `transformers serve --continuous-batching` then generates one by one."""
        raise AttributeError(NO_CONTINUOUS_BATCHING)

    def continuous_batching_context_manager(self, *args: Any, **kwargs: Any) -> Any:
        """Not available; see [`~EBTGenerationMixin.generate_batch`]."""
        raise NotImplementedError(NO_CONTINUOUS_BATCHING)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """
        Not available: continuous batching keeps the context in pages that only an attention function of transformers
        can read, and candidates read it themselves, at every thinking step.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(NO_CONTINUOUS_BATCHING)

    @staticmethod
    def _call_thinking(kwargs: dict[str, Any], generation_configs: list[Any]) -> ThinkingConfig:
        # popped here: left in, transformers would put them into the generation config and the model would not see them
        flat = {name: kwargs.pop(name) for name in FLAT_THINKING_NAMES if name in kwargs}
        thinking = ThinkingConfig.from_call(kwargs.pop("thinking", None), flat)
        for config in generation_configs:
            thinking = thinking.merged_over(configured_thinking(config))
        return thinking

    def _prepare_generated_length(self, *args: Any, **kwargs: Any) -> Any:
        config = super()._prepare_generated_length(*args, **kwargs)
        # the last token is never fed back, so the text may be one longer than the context
        longest = self.config.max_position_embeddings + 1
        if config.max_length is not None and config.max_length > longest:
            logger.warning(
                f"The text would reach {config.max_length} tokens, the model's context is {longest - 1} "
                f"(`config.max_position_embeddings`): generation ends at {longest} tokens. Give a smaller "
                "`max_new_tokens` to end earlier."
            )
            config.max_length = longest
        return config

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        return criteria if _TRACE.get() is None else _TracedCriteria(criteria)

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        trace = _TRACE.get()
        if trace is not None and outputs.get("energies") is not None:
            trace.energies.append(outputs.energies[:, -1])
            trace.steps_taken.append(outputs.steps_taken[:, -1])
        account = _ACCOUNT.get()
        if account is not None and outputs.get("steps_spent") is not None:
            account.spent = outputs.steps_spent[:, -1]
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)

    def _get_running_beams_for_next_iteration(self, *args: Any, **kwargs: Any) -> Any:
        running = super()._get_running_beams_for_next_iteration(*args, **kwargs)
        account = _ACCOUNT.get()
        if account is not None and account.spent is not None:
            # the newest beams go on from the rows that the last filled column names
            parents = running[2].flatten(0, 1)
            last = (parents >= 0).sum(1, keepdim=True) - 1
            account.spent = account.spent[parents.gather(1, last)[:, 0].long()]
        return running

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        # a token is told what those before it have used up of a thinking budget
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        account = _ACCOUNT.get()
        if account is not None and account.spent is not None:
            inputs["steps_spent"] = account.spent
        return inputs

    @staticmethod
    def _with_energies(output: Any, trace: _Trace) -> Any:
        energies = torch.stack(trace.energies, dim=1)
        steps = torch.stack(trace.steps_taken, dim=1)
        beams = getattr(output, "beam_indices", None)
        if beams is None:
            # a row is over for the tokens after the one that ended it
            over = torch.stack(trace.ended, dim=1).cumsum(1).roll(1, dims=1).bool()
            over[:, 0] = False
        else:
            beams = beams[:, : energies.shape[1]]
            over = beams < 0
            rows, columns = beams.clamp(min=0), torch.arange(beams.shape[1], device=beams.device)[None]
            energies, steps = energies[rows, columns], steps[rows, columns]
        energies = energies.masked_fill(over[..., None], float("nan"))
        steps = steps.masked_fill(over, 0)
        if beams is None:
            return EBTGenerateOutput(**output, energies=energies, steps_taken=steps)
        return EBTGenerateBeamOutput(**output, energies=energies, steps_taken=steps)


__all__ = [
    "EBTGenerateBeamOutput",
    "EBTGenerateOutput",
    "EBTGenerationMixin",
    "configured_thinking",
    "once_per_generation",
]
