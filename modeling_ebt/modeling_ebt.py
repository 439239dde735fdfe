"""
Energy-Based Transformer for text (arXiv 2507.02092): the language model that descends the transformer's energy.

Shapes: ``B`` rows, ``S`` new context tokens, ``T`` positions thought about, ``M`` candidates a position, ``N = M T``,
``V`` vocabulary, ``D`` width, ``K`` landscapes or steps.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults

from .budget import StepBudget
from .candidates import TextCandidates
from .checks import check_energies, check_labels, check_token_ids, outside_inference_mode
from .configuration_ebt import EBTConfig
from .descent import DescentOutput, DescentStep, descend
from .generation import EBTGenerationMixin, once_per_generation
from .layers_common import EBTStepSize
from .learning import learn
from .losses import TextStepLosses
from .outputs import EBTCausalLMOutputWithPast, EBTContext, EBTModelOutputWithPast
from .stopping import WORTH_COPYING, WORTH_NARROWING, Narrowing
from .thinking import (
    Thinking,
    choose_candidate,
    given_start,
    make_schedule,
    pick_candidate,
    random_generator,
    random_offsets,
    random_step_sizes,
    resolve_thinking,
    stop_rules,
    training_start,
)
from .thinking_ebt import ThinkingConfig
from .token_scores import EBTTokenScoresMixin
from .transformer import EBTModel, EBTPreTrainedModel


TRAINING_CHUNK_SIZES = {"cpu": 512}  # candidates that keep the products with the table busy; 8192 on other devices


class EBTForCausalLM(EBTTokenScoresMixin, EBTGenerationMixin, EBTPreTrainedModel, GenerationMixin):
    r"""
    Energy-Based Transformer language model: the next token's logits are found by descending an energy.

    Args:
        config ([`EBTConfig`]): the architecture.

    Example:

    ```python
    >>> import torch
    >>> from ebt_transformers import EBTConfig, EBTForCausalLM

    >>> model = EBTForCausalLM(EBTConfig.from_preset("4xs", vocab_size=32)).eval()
    >>> output = model(torch.tensor([[1, 2, 3]]), thinking_steps=4, output_energies=True)
    >>> output.logits.shape, output.energies.shape
    (torch.Size([1, 3, 32]), torch.Size([1, 3, 5]))
    ```
    """

    _auto_class = "AutoModelForCausalLM"  # a saved model carries its code
    # half precision holds a step size of 500 to the nearest 2 or 4 only
    _keep_in_fp32_modules_strict = ["step_size"]
    _tied_weights_keys = {"candidate_embedding.weight": "model.embed_tokens.weight"}

    def __init__(self, config: EBTConfig) -> None:
        super().__init__(config)
        self.model = EBTModel(config)
        # (V, D), used in both directions: distributions are mixed with it, gradients are projected with it
        self.candidate_embedding = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.step_size = EBTStepSize(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The candidate embedding: it plays the output layer's part in resizing and tying."""
        return self.candidate_embedding

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replaces the candidate embedding."""
        self.candidate_embedding = new_embeddings

    @outside_inference_mode
    @can_return_tuple
    @merge_with_config_defaults
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        thinking: ThinkingConfig | dict[str, Any] | None = None,
        initial_candidate: Tensor | None = None,
        steps_spent: Tensor | None = None,
        output_energies: bool | None = None,
        output_trajectory: bool | None = None,
        **kwargs: Any,
    ) -> EBTCausalLMOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(B, S)`, *optional*): context tokens; candidate `s` is for token
                `s + 1`.
            attention_mask (`Tensor` of shape `(B, past + S)`, *optional*): 1 for tokens, 0 for padding, left or right.
            position_ids (`torch.LongTensor` of shape `(B, S)`, *optional*): counted from `attention_mask` by default.
            past_key_values (`Cache`, *optional*): context of earlier calls.
            inputs_embeds (`torch.FloatTensor` of shape `(B, S, D)`, *optional*): instead of `input_ids`.
            labels (`torch.LongTensor` of shape `(B, S)`, *optional*): tokens, shifted inside, -100 ignored. Already
                shifted labels can be given as `shift_labels`.
            use_cache (`bool`, *optional*, defaults to `config.use_cache`): return `past_key_values`.
            output_hidden_states, output_attentions (`bool`, *optional*): of the context stream.
            logits_to_keep (`int` or `Tensor`, *optional*, defaults to 0): think at the last so many positions only, or
                at the positions given; 0 means all.
            thinking ([`ThinkingConfig`] or `dict`, *optional*): how to think; its fields can also be given flat, as
                `thinking_steps=8`. Unset fields come from the config.
            initial_candidate (`torch.FloatTensor` of shape `(B, T, V)` or `(B, M, T, V)`, *optional*): logits to start
                from.
            steps_spent (`torch.LongTensor` of shape `(B,)`, *optional*): steps of `thinking_budget` that earlier calls
                used for each row: their `output.steps_spent[:, -1]`.
            output_energies (`bool`, *optional*): return `energies`, the last being that of the returned logits (one
                more forward of the candidate stream).
            output_trajectory (`bool`, *optional*): return `trajectory`, the logits after every step: `K + 1` times the
                memory of `logits`, so best with `logits_to_keep`.
            kwargs: `num_items_in_batch` and `shift_labels` for the loss, and `loss_reduction="none"` for the loss of
                every token, `(B, T)`, the one at `s` being that of token `s + 1` and 0 where its label is -100.

        Returns:
            [`EBTCausalLMOutputWithPast`].

        Raises:
            ValueError: for bad input (see [`EBTModel.forward`]), thinking options that are unknown or out of range,
                an initial candidate of the wrong shape, or `steps_spent` of the wrong shape or without a budget.
        """
        flat = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("thinking_")}
        resolved = resolve_thinking(self.config, thinking, flat, self.training)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache and not (self.training and labels is not None),
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            num_landscapes=max(resolved.landscapes, default=0) + 1,
            need_hidden=self.config.starts_at_prediction,
        )
        context = outputs.context
        budget = None
        if resolved.budget is not None or steps_spent is not None:
            budget = StepBudget.of_call(resolved.budget, steps_spent, context.batch_size, context.position_ids)
        if not isinstance(logits_to_keep, int):
            keep: Tensor | slice = logits_to_keep
        elif logits_to_keep < 0:
            raise ValueError(f"`logits_to_keep` must be at least 0 (0 keeps all), got {logits_to_keep}.")
        elif logits_to_keep > 0:
            keep = slice(-logits_to_keep, None)
        else:
            keep = slice(None)
        context = context.keep(keep)
        batch = context.batch_size
        proposal = self._proposal(context)
        shape = (batch, resolved.candidates, context.position_ids.shape[1], self.config.vocab_size)
        step_size = self.step_size()
        if self.training:
            step_size = random_step_sizes(self.config, step_size, (batch, shape[2], 1))
        schedule = make_schedule(resolved, step_size)
        losses = None
        targets = labels if kwargs.get("shift_labels") is None else kwargs["shift_labels"]
        if targets is not None:
            check_labels(targets, (batch, shape[2]), shape[-1])
            losses = TextStepLosses(self, labels, self.config.loss_on_steps, kwargs)
            if proposal is not None:
                losses.record_proposal(proposal, float(self.config.proposal_loss_weight))
        observed = bool(output_energies or output_trajectory)
        if (
            losses is not None
            and not observed
            and self._learns_in_chunks(losses, schedule, initial_candidate, proposal)
        ):
            # compiled or not, what takes gradients on the way runs as it is written
            learn_now = torch.compiler.disable(self._learn) if torch.compiler.is_compiling() else self._learn
            return learn_now(context, schedule, resolved, losses, initial_candidate, proposal, outputs)
        state = self._initial_state(batch, context, resolved, initial_candidate, proposal)
        single = state.shape[1] == 1
        states: list[Tensor] = [state.flatten(1, 2)] if output_trajectory else []

        def on_step(index: int, state: Tensor, energy: Tensor) -> None:
            if losses is not None and single:
                losses.record(index, state, energy)
            if output_trajectory:
                states.append(state.detach())

        watched = output_trajectory or (losses is not None and single)
        budget = None if budget is None else budget.keep(keep)
        drawn_anew = resolved.seed == -1 and (resolved.candidates > 1 or resolved.init != "mean")
        shared_start = not self.training and proposal is None and initial_candidate is None and not drawn_anew
        result = self._think(
            state,
            context,
            schedule,
            resolved,
            budget,
            shared_start,
            bool(output_energies),
            on_step if watched else None,
        )
        if not self.training and schedule:
            check_energies(result.energies[-1], schedule[-1].step_size)
        chosen = choose_candidate(result, resolved.selection, state.shape[1])
        logits = pick_candidate(result.state, chosen)
        loss = None
        if losses is not None:
            loss = losses.objective() if self.training else losses(logits)
        return EBTCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            energies=pick_candidate(torch.stack(result.energies, dim=-1), chosen) if output_energies else None,
            steps_taken=pick_candidate(result.steps_taken, chosen),
            steps_spent=None if budget is None else budget.share(result.steps_tried, state.shape[1])[1],
            step_losses=None if losses is None else losses.stacked(),
            proposal_loss=None if losses is None or losses.proposal is None else losses.proposal.detach(),
            mean_energies=_mean_energies(result, len(schedule), losses) if self.training and schedule else None,
            trajectory=pick_candidate(torch.stack(states, dim=2), chosen) if output_trajectory else None,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @outside_inference_mode
    def energy(
        self,
        input_ids: Tensor,
        candidate_ids: Tensor | None = None,
        candidate_probs: Tensor | None = None,
        attention_mask: Tensor | None = None,
        landscape: int | None = None,
    ) -> Tensor:
        """
        Energy of given candidates: how badly each fits its context. Lower is better; only differences within a
        position mean anything.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, S)`): context tokens.
            candidate_ids (`torch.LongTensor` of shape `(B, S)` or `(B, M, S)`, *optional*): candidate tokens; the one
                at `s` stands for token `s + 1`.
            candidate_probs (`torch.FloatTensor` of shape `(B, S, V)` or `(B, M, S, V)`, *optional*): candidate
                distributions instead. The result is differentiable in them.
            attention_mask (`Tensor` of shape `(B, S)`, *optional*): 1 for tokens, 0 for padding.
            landscape (`int`, *optional*): which landscape to score on; the last by default.

        Returns:
            `torch.FloatTensor` of shape `(B, S)` or `(B, M, S)`, in float32.

        Raises:
            ValueError: for both or neither kind of candidate, or a shape that does not fit the context.

        Example:

        ```python
        >>> import torch
        >>> from ebt_transformers import EBTConfig, EBTForCausalLM

        >>> model = EBTForCausalLM(EBTConfig.from_preset("4xs", vocab_size=32)).eval()
        >>> ids = torch.tensor([[1, 2, 3, 4]])
        >>> model.energy(ids[:, :-1], candidate_ids=ids[:, 1:]).shape
        torch.Size([1, 3])
        ```
        """
        if (candidate_ids is None) == (candidate_probs is None):
            raise ValueError("Give exactly one of `candidate_ids` and `candidate_probs`.")
        table = self._candidate_table()
        if candidate_probs is not None:
            if candidate_probs.shape[-1] != self.config.vocab_size:
                raise ValueError(
                    f"`candidate_probs` must range over the vocabulary of {self.config.vocab_size}, got "
                    f"{candidate_probs.shape[-1]}."
                )
            embeds = TextCandidates(table).embed(candidate_probs)
        elif candidate_ids is not None:
            check_token_ids(candidate_ids, self.config.vocab_size, "candidate_ids")
            embeds = nn.functional.embedding(candidate_ids, table)
        shape = embeds.shape[:-1]
        if len(shape) not in (2, 3) or (shape[0], shape[-1]) != tuple(input_ids.shape):
            raise ValueError(
                f"Candidates must be one (or M) for each of the {tuple(input_ids.shape)} context positions, got "
                f"{tuple(shape)}."
            )
        last = self.config.num_landscapes - 1
        landscape = last if landscape is None else landscape
        if not 0 <= landscape <= last:
            raise ValueError(f"`landscape` must be between 0 and {last}, got {landscape}.")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=False,
            num_landscapes=landscape + 1,
            need_hidden=False,
        )
        context = outputs.context.repeat_candidates(1 if len(shape) == 2 else shape[1])
        energies = self.model(candidate_embeds=embeds.flatten(1, -2), context=context, landscape=landscape).energies
        return energies.view(shape)

    def _candidate_table(self) -> Tensor:
        """The table [W] (V, D) of candidates, with the adapter that may be around their embedding."""
        layer = self.candidate_embedding
        if isinstance(layer, nn.Linear):
            return layer.weight
        # whatever kind of adapter it is: a linear map is what it makes of the identity
        weight = layer.weight
        return layer(torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)).t()

    def _proposal(self, context: EBTContext) -> Tensor | None:
        """What the context stream itself predicts, logits (B, T, V) in float32; None if nothing starts there."""
        if context.predictors is None:
            return None
        table = self._candidate_table()
        return nn.functional.linear(context.predictors.to(table.dtype), table).float()

    def _initial_state(
        self, batch: int, context: EBTContext, thinking: Thinking, given: Tensor | None, proposal: Tensor | None
    ) -> Tensor:
        """Initial logits (B, M, T, V) in float32."""
        vocab, device = self.candidate_embedding.weight.shape[0], self.candidate_embedding.weight.device
        shape = (batch, thinking.candidates, context.position_ids.shape[1], vocab)
        if given is not None:
            return given_start(given, shape, "rows, candidates, positions, vocabulary", self.training).to(device)
        std = float(self.config.candidate_init_std)
        if self.training and proposal is not None:
            return proposal[:, None]
        if self.training:
            return training_start(thinking.init != "mean", std, shape, device)
        starts = self._shared_start(thinking)[None, :, None]
        return starts.expand(shape) if proposal is None else starts + proposal[:, None]

    def _shared_start(self, thinking: Thinking) -> Tensor:
        """Logits (M, V) that all rows and positions start from in evaluation, besides what the context proposes."""
        vocab, device = self.candidate_embedding.weight.shape[0], self.candidate_embedding.weight.device
        return random_offsets(thinking, (thinking.candidates, vocab), float(self.config.candidate_init_std), device)

    def _embedded_start(self, thinking: Thinking) -> Tensor | None:
        """What [`_shared_start`] embeds to, (M, D), while generating; else None."""

        def make() -> Tensor:
            with torch.no_grad():
                space = TextCandidates(self._candidate_table())
                return space.embed(space.point(self._shared_start(thinking)))

        return once_per_generation(("start", id(self), thinking.candidates, thinking.init, thinking.seed), make)

    def _think(
        self,
        state: Tensor,
        context: EBTContext,
        schedule: list[DescentStep],
        thinking: Thinking,
        budget: StepBudget | None,
        shared_start: bool,
        output_energies: bool,
        on_step: Callable[[int, Tensor, Tensor], None] | None,
    ) -> DescentOutput:
        """Descends all candidates of all positions at once; states are (B, N, V), candidate-major."""
        candidates = state.shape[1]
        if not schedule:
            stop_rules(thinking, candidates)  # says what is wrong with them, as it would with steps
            return self._unmoved(state, context, output_energies or candidates > 1)
        context = context.repeat_candidates(candidates)
        learning = self.training and torch.is_grad_enabled()
        if learning and self.config.second_order != "double_backward":
            raise ValueError(
                f"`second_order={self.config.second_order!r}` is for training steps that take their candidates in "
                "chunks: with labels and transformers' own loss, without trajectories or energies to return, with "
                "steps detached from one another and weights in one place. This one does not; set "
                "`config.second_order` to 'double_backward'."
            )

        def energy(embedded: Tensor, landscape: int, context: EBTContext = context) -> Tensor:
            return self.model(candidate_embeds=embedded, context=context, landscape=landscape).energies

        graph = "none"
        if learning:
            graph = "all" if self.config.loss_on_steps == "all" else "last"
        # each token of a text has noise of its own, the same with every kind of cache
        noisy = any(step.noise_std > 0 for step in schedule)
        position = int(context.position_ids.max()) if noisy else 0
        if budget is not None and noisy and thinking.seed == -1:
            # a budget may walk twice: the second time with the noise of the first
            thinking = replace(thinking, seed=int(torch.randint(2**31, (1,))))

        # a decoded token is little work beside the copy of its row's keys
        worth = WORTH_COPYING if state.shape[2] == 1 else WORTH_NARROWING
        narrow = Narrowing(lambda index: partial(energy, context=context.select(*index)), worth)

        first = None
        judged = thinking.accept_only_lower_energy or stop_rules(thinking, candidates).given
        if shared_start and schedule[0].noise_std == 0 and not judged:
            # the same for all tokens of a text (where energies are compared, a state that comes back must embed to the
            # last bit as before)
            first = self._embedded_start(thinking)
            first = None if first is None else first.repeat_interleave(state.shape[2], 0)

        def walk(limits: Tensor | None, **options: Any) -> DescentOutput:
            return descend(
                energy,
                TextCandidates(self._candidate_table(), self.config.update, first),
                state.flatten(1, 2),
                schedule,
                detach_between_steps=self.config.detach_between_steps or not learning,
                graph_on_steps=graph,
                accept_only_lower_energy=thinking.accept_only_lower_energy,
                stop=stop_rules(thinking, candidates, limits),
                narrow=narrow,
                generator=random_generator(thinking, state.device, position),
                checkpoint=self._gradient_checkpointing_func if learning and self.gradient_checkpointing else None,
                **options,
            )

        limits = None
        if budget is not None:
            shape, positions = (state.shape[0], candidates * state.shape[2]), state.shape[2]
            wanted = torch.full(shape, len(schedule), device=state.device)
            if positions > 1:
                # what is left to a position shows when those before it have thought
                wanted = walk(None).steps_tried
            limits = budget.share(wanted, candidates)[0].repeat(1, candidates)
        return walk(limits, final_energy=output_energies or candidates > 1, on_step=on_step)

    def _learns_in_chunks(
        self,
        losses: TextStepLosses,
        schedule: list[DescentStep],
        given: Tensor | None,
        proposal: Tensor | None,
    ) -> bool:
        """Whether this is a plain training step, whose candidates can be taken a few at a time."""
        if not (self.training and torch.is_grad_enabled() and schedule and self.config.training_chunk_size != 0):
            return False
        detached = self.config.detach_between_steps
        if self.config.loss_on_steps == "last" and proposal is None:
            # before the step that is scored nothing learns but the step size
            learned = any(torch.is_tensor(step.step_size) and step.step_size.requires_grad for step in schedule)
            detached = detached or not (learned or (given is not None and given.requires_grad))
        # sharded, gathered or replicated weights have gradients that only autograd's own backward pass finds
        weights = list(self.parameters())
        whole = all(type(each) is nn.Parameter and each.is_leaf and not hasattr(each, "ds_id") for each in weights)
        return detached and losses.is_plain and bool(weights) and whole

    def _learn(
        self,
        context: EBTContext,
        schedule: list[DescentStep],
        thinking: Thinking,
        losses: TextStepLosses,
        given: Tensor | None,
        proposal: Tensor | None,
        outputs: EBTModelOutputWithPast,
    ) -> EBTCausalLMOutputWithPast:
        """A training step that takes its candidates a few at a time and differentiates them on the way."""
        space = TextCandidates(self._candidate_table(), self.config.update)
        batch, positions, vocab = context.batch_size, context.position_ids.shape[1], len(space.table)
        if given is not None:
            axes = "rows, candidates, positions, vocabulary"
            given = given_start(given, (batch, 1, positions, vocab), axes, True)[:, 0].to(space.table.device)
        fixed = proposal if given is None else given

        def start(rows: slice, columns: slice, room: Tensor) -> Tensor:
            if fixed is not None:
                return fixed[rows, columns].detach().to(room.dtype)
            shape = (len(range(batch)[rows]), len(range(positions)[columns]), vocab)
            std = float(self.config.candidate_init_std)
            out = room if room.dtype == torch.float32 else None
            return training_start(thinking.init != "mean", std, shape, space.table.device, out).to(room.dtype)

        def energy(embedded: Tensor, context: EBTContext, landscape: int) -> Tensor:
            return self.model(candidate_embeds=embedded, context=context, landscape=landscape).energies

        own = {id(space.table)}
        noisy = any(step.noise_std > 0 for step in schedule)
        learned = learn(
            energy,
            [each for each in self.model.parameters() if each.requires_grad and id(each) not in own],
            space,
            context,
            start,
            schedule,
            losses.targets(),
            losses.items(),
            loss_on_steps=self.config.loss_on_steps,
            second_order=self.config.second_order,
            chunk_size=self.config.training_chunk_size or TRAINING_CHUNK_SIZES.get(space.table.device.type, 8192),
            generator=random_generator(thinking, space.table.device, int(context.position_ids.max()) if noisy else 0),
        )
        losses.take(learned.losses, learned.objective)
        result = learned.result
        return EBTCausalLMOutputWithPast(
            loss=losses.objective(),
            logits=result.state,
            steps_taken=result.steps_taken,
            step_losses=losses.stacked(),
            proposal_loss=None if losses.proposal is None else losses.proposal.detach(),
            mean_energies=_mean_energies(result, len(schedule), losses),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _unmoved(self, state: Tensor, context: EBTContext, with_energies: bool) -> DescentOutput:
        """The end of a descent without steps: its start, with the energies on the first landscape if asked for."""
        states, energies = state.flatten(1, 2), []
        if with_energies:
            with torch.no_grad():
                space = TextCandidates(self._candidate_table())
                embedded = space.embed(space.point(states))
                context = context.repeat_candidates(state.shape[1])
                energies = [self.model(candidate_embeds=embedded, context=context, landscape=0).energies]
        none = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
        return DescentOutput(states, energies, none, none)

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """The model builds its own masks, also for static caches: the tokens' mask is all it needs."""
        return attention_mask


def _mean_energies(result: DescentOutput, steps: int, losses: TextStepLosses | None) -> Tensor:
    """Mean energy before each of the `K` steps over the positions with a label, (K,)."""
    energies = torch.stack([energy.detach() for energy in result.energies[:steps]])
    labelled = None if losses is None else losses.labelled(energies.shape[1:])
    return energies.flatten(1).mean(1) if labelled is None else energies[:, labelled].mean(1)


__all__ = ["EBTForCausalLM", "EBTModel", "EBTPreTrainedModel"]
