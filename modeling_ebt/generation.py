"""Thinking in `generate()`: options resolved once, energies of every token carried out."""

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

from .thinking_ebt import FLAT_THINKING_NAMES, ThinkingConfig


@dataclass
class EBTGenerateOutput(GenerateDecoderOnlyOutput):
    """
    [`~generation.GenerateDecoderOnlyOutput`] with the thinking.

    Args:
        energies (`torch.FloatTensor` of shape `(B, new, K + 1)`): energy of each token's candidate before every step
            and after the last.
        steps_taken (`torch.LongTensor` of shape `(B, new)`): steps that moved it.
    """

    energies: torch.FloatTensor | None = None
    steps_taken: torch.LongTensor | None = None


@dataclass
class EBTGenerateBeamOutput(GenerateBeamDecoderOnlyOutput):
    """As [`EBTGenerateOutput`], for beam search: energies along each returned beam, NaN after its end."""

    energies: torch.FloatTensor | None = None
    steps_taken: torch.LongTensor | None = None


# one list for each running generate() call; a context variable keeps threads apart
_TRACE: ContextVar[list[tuple[Tensor, Tensor]] | None] = ContextVar("ebt_thinking_trace", default=None)


class EBTGenerationMixin:
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
            ValueError: for options that are unknown or out of range, and for `output_energies` in a decoding mode that
                proposes several tokens at once.
        """
        generation_config = kwargs.get("generation_config")
        if generation_config is None and len(args) > 1:
            generation_config = args[1]
        configured = generation_config if generation_config is not None else self.generation_config
        thinking = self._call_thinking(kwargs, configured)
        kwargs["thinking"] = thinking
        returns_dict = kwargs.get("return_dict_in_generate")
        if returns_dict is None:
            returns_dict = getattr(configured, "return_dict_in_generate", False)
        if not output_energies:
            return super().generate(*args, **kwargs)
        if not returns_dict:
            raise ValueError("`output_energies=True` needs `return_dict_in_generate=True` to have somewhere to go.")
        if kwargs.get("assistant_model") is not None or kwargs.get("prompt_lookup_num_tokens"):
            raise ValueError("`output_energies=True` is not available with assisted decoding, which skips tokens.")
        trace: list[tuple[Tensor, Tensor]] = []
        token = _TRACE.set(trace)
        try:
            output = super().generate(*args, output_energies=True, **kwargs)
        finally:
            _TRACE.reset(token)
        return self._with_energies(output, trace)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """[`PreTrainedModel.save_pretrained`], with the `thinking_*` attributes of the generation config."""
        if self.generation_config is not None:
            # a mark of configs never touched by a user; loading drops all but the standard attributes of those
            self.generation_config._from_model_config = False
        super().save_pretrained(*args, **kwargs)

    @staticmethod
    def _call_thinking(kwargs: dict[str, Any], generation_config: Any) -> ThinkingConfig:
        # popped here: left in, transformers would put them into the generation config and the model would not see them
        flat = {name: kwargs.pop(name) for name in FLAT_THINKING_NAMES if name in kwargs}
        called = ThinkingConfig.from_value({name: value for name, value in flat.items() if value is not None})
        called = called.merged_over(ThinkingConfig.from_value(kwargs.pop("thinking", None)))
        configured = {name: getattr(generation_config, name, None) for name in FLAT_THINKING_NAMES}
        return called.merged_over(
            ThinkingConfig.from_value({name: value for name, value in configured.items() if value is not None})
        )

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        trace = _TRACE.get()
        if trace is not None and outputs.get("energies") is not None:
            trace.append((outputs.energies[:, -1], outputs.steps_taken[:, -1]))
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)

    @staticmethod
    def _with_energies(output: Any, trace: list[tuple[Tensor, Tensor]]) -> Any:
        energies = torch.stack([energy for energy, _ in trace], dim=1)
        steps = torch.stack([step for _, step in trace], dim=1)
        if getattr(output, "beam_indices", None) is None:
            if output.sequences.shape[0] != energies.shape[0]:
                return output
            return EBTGenerateOutput(**output, energies=energies, steps_taken=steps)
        beams = output.beam_indices[:, : energies.shape[1]]
        ended = beams < 0
        columns = torch.arange(beams.shape[1], device=beams.device)[None]
        rows = beams.clamp(min=0)
        energies = energies[rows, columns].masked_fill(ended[..., None], float("nan"))
        steps = steps[rows, columns].masked_fill(ended, 0)
        return EBTGenerateBeamOutput(**output, energies=energies, steps_taken=steps)


__all__ = ["EBTGenerateBeamOutput", "EBTGenerateOutput", "EBTGenerationMixin"]
