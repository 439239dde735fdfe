"""What the models return."""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput


@dataclass
class EBTContext:
    """
    The context stream, ready for candidates to attend to. ``B`` rows, ``K`` landscapes, ``C`` key columns (cached
    tokens, new tokens and, with `step_conditioning="time_embed"`, the step token in front).

    Args:
        keys, values (`list[Tensor]`): for every layer `(B, K, H_kv, C, d)`.
        mask (`Tensor` of shape `(B or 1, 1, S, C)`): True where the candidate of new token `s` may look.
        position_ids (`Tensor` of shape `(B or 1, S)`): rotary positions of the candidates.
        anchors (`Tensor` of shape `(B, S, D)`, *optional*): token embeddings added to the candidates.
        predictors (`Tensor` of shape `(B, S, D)`, *optional*): normed hidden states of the first landscape, from which
            the descent's start is predicted (`candidate_init="proposal"`).
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    mask: torch.Tensor
    position_ids: torch.Tensor
    anchors: torch.Tensor | None = None
    predictors: torch.Tensor | None = None

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.keys[0].shape[0]

    @property
    def num_landscapes(self) -> int:
        """Landscapes this context was computed for."""
        return self.keys[0].shape[1]

    def on_landscape(self, landscape: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values `(B, H_kv, C, d)` of every layer on one landscape."""
        return [(key[:, landscape], value[:, landscape]) for key, value in zip(self.keys, self.values, strict=True)]

    def keep(self, positions: torch.Tensor | slice) -> "EBTContext":
        """The same context with candidates at some of the new positions only."""
        anchors = None if self.anchors is None else self.anchors[:, positions]
        predictors = None if self.predictors is None else self.predictors[:, positions]
        mask, position_ids = self.mask[:, :, positions], self.position_ids[:, positions]
        return EBTContext(self.keys, self.values, mask, position_ids, anchors, predictors)

    def repeat_candidates(self, count: int) -> "EBTContext":
        """The same context with `count` candidates at every position, candidate-major; keys are shared, not copied."""
        if count == 1:
            return self
        anchors = None if self.anchors is None else self.anchors.repeat(1, count, 1)
        mask, position_ids = self.mask.repeat(1, 1, count, 1), self.position_ids.repeat(1, count)
        return EBTContext(self.keys, self.values, mask, position_ids, anchors)

    def select(self, rows: torch.Tensor, columns: torch.Tensor) -> "EBTContext":
        """
        The same context for some of the candidates.

        Args:
            rows (`torch.LongTensor` of shape `(R, 1)`): ascending, each at most once; keys are copied only if some are
                missing.
            columns (`torch.LongTensor` of shape `(R, n)`): the candidates of each.
        """
        keys, values, first = self.keys, self.values, rows[:, 0]
        if len(rows) < self.batch_size:
            keys, values = ([part.index_select(0, first) for part in parts] for parts in (keys, values))
        anchors = None if self.anchors is None else self.anchors[rows, columns]
        shared = rows if len(self.mask) > 1 else torch.zeros_like(rows)
        mask = self.mask[shared, 0, columns][:, None]
        positions = self.position_ids[rows if len(self.position_ids) > 1 else torch.zeros_like(rows), columns]
        return EBTContext(keys, values, mask, positions, anchors)


@dataclass
class EBTModelOutputWithPast(ModelOutput):
    """
    Output of [`EBTModel`].

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(B, S, D)`, *optional*):
            Normed hidden states of the context stream on its last landscape.
        energies (`torch.FloatTensor` of shape `(B, N)`, *optional*): energies of the candidates, in float32.
        past_key_values (`Cache`, *optional*): keys and values of the context, the landscapes side by side as heads.
        hidden_states (`tuple` of `(B, S, D)`, *optional*): context stream on its last landscape, embeddings first.
        attentions (`tuple` of `(B, H, S, C)`, *optional*):
            Context attention on its last landscape (eager only), the column of a step token in front included.
        context ([`EBTContext`], *optional*): what candidates attend to; pass it back to score candidates.
    """

    last_hidden_state: torch.Tensor | None = None
    energies: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    context: EBTContext | None = None


@dataclass
class EBTCausalLMOutputWithPast(ModelOutput):
    """
    Output of [`EBTForCausalLM`]. ``B`` rows, ``T`` positions thought about, ``K`` thinking steps.

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*):
            In training mode the recipe's objective, in evaluation mode the cross-entropy of the final logits; of shape
            `(B, T)` with `loss_reduction="none"`.
        logits (`torch.FloatTensor` of shape `(B, T, V)`): next-token logits after the last step, in float32.
        energies (`torch.FloatTensor` of shape `(B, T, K + 1)`, *optional*):
            With `output_energies=True`: energy of the chosen candidate before every step and after the last.
        steps_taken (`torch.LongTensor` of shape `(B, T)`, *optional*): steps that moved the chosen candidate.
        steps_spent (`torch.LongTensor` of shape `(B, T)`, *optional*):
            With `thinking_budget`: steps of it that each text has used up to and with this position.
        step_losses (`torch.FloatTensor` of shape `(K,)`, *optional*):
            Cross-entropy after each step, with labels; `(K, B, T)` with `loss_reduction="none"`.
        proposal_loss (`torch.FloatTensor` of shape `()`, *optional*):
            Cross-entropy before the first step, with labels and `candidate_init="proposal"`; `(B, T)` with
            `loss_reduction="none"`.
        mean_energies (`torch.FloatTensor` of shape `(K,)`, *optional*): mean energy before each step, in training
            mode.
        past_key_values (`Cache`, *optional*): keys and values of the context, the landscapes side by side as heads.
        hidden_states (`tuple` of `(B, S, D)`, *optional*): context stream on its last landscape, embeddings first.
        attentions (`tuple` of `(B, H, S, C)`, *optional*):
            Context attention on its last landscape (eager only), the column of a step token in front included.
        trajectory (`torch.FloatTensor` of shape `(B, T, K + 1, V)`, *optional*):
            With `output_trajectory=True`: the chosen candidate's logits at the start and after every step.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    energies: torch.Tensor | None = None
    steps_taken: torch.Tensor | None = None
    steps_spent: torch.Tensor | None = None
    step_losses: torch.Tensor | None = None
    proposal_loss: torch.Tensor | None = None
    mean_energies: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    trajectory: torch.Tensor | None = None


@dataclass
class EBTImageModelOutput(ModelOutput):
    """
    Output of [`EBTImageModel`]. ``B`` images, ``T`` patches, ``D`` width.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(B, T, D)`): patches after the last layer, before its norm.
        energies (`torch.FloatTensor` of shape `(B, T)`): the energy of every patch, row by row, in float32.
        hidden_states (`tuple` of `(B, T, D)`, *optional*): embedded patches, then those after every layer.
        attentions (`tuple` of `(B, H, T, T)`, *optional*): attention weights of every layer.
    """

    last_hidden_state: torch.Tensor | None = None
    energies: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class EBTImageDenoisingOutput(ModelOutput):
    """
    Output of [`EBTForImageDenoising`]. ``B`` images, ``K`` thinking steps.

    Args:
        loss (`torch.FloatTensor`, *optional*):
            With labels: in training mode the recipe's objective, in evaluation mode the distance of the final images.
        reconstruction (`torch.FloatTensor` of shape `(B, C, H, W)`): the denoised images, not clipped, in float32.
        energies (`torch.FloatTensor` of shape `(B, K + 1)`, *optional*):
            With `output_energies=True`: energy of the chosen candidate before every step and after the last.
        steps_taken (`torch.LongTensor` of shape `(B,)`): steps that moved the chosen candidate.
        step_losses (`torch.FloatTensor` of shape `(K,)`, *optional*): the loss after each step, with labels.
        mean_energies (`torch.FloatTensor` of shape `(K,)`, *optional*): mean energy before each step, in training
            mode.
        trajectory (`torch.FloatTensor` of shape `(B, K + 1, C, H, W)`, *optional*):
            With `output_trajectory=True`: the start and the image after every step.
    """

    loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    energies: torch.Tensor | None = None
    steps_taken: torch.Tensor | None = None
    step_losses: torch.Tensor | None = None
    mean_energies: torch.Tensor | None = None
    trajectory: torch.Tensor | None = None


__all__ = [
    "EBTCausalLMOutputWithPast",
    "EBTContext",
    "EBTImageDenoisingOutput",
    "EBTImageModelOutput",
    "EBTModelOutputWithPast",
]
