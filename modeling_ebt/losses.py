"""The training objective: transformers' causal language model loss, applied to the steps of a descent."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel


def perplexity(mean_loss: float) -> float:
    """exp(mean loss), infinite where a float cannot hold it."""
    return math.exp(mean_loss) if mean_loss < 700 else math.inf


class StepLosses:
    """
    Cross-entropy after every thinking step.

    Args:
        model (`PreTrainedModel`): whose `loss_function` is used.
        labels (`Tensor` of shape `(B, T)`, *optional*): tokens, shifted by the loss, -100 ignored.
        loss_on_steps (`str`): `"all"` scores the mean over steps (recipe s1), `"last"` the last step (recipe s2).
        kwargs (`dict`): `num_items_in_batch` and `shift_labels` of the loss.
    """

    def __init__(
        self, model: PreTrainedModel, labels: Tensor | None, loss_on_steps: str, kwargs: dict[str, Any]
    ) -> None:
        self.model = model
        self.labels = labels
        self.loss_on_steps = loss_on_steps
        self.kwargs = kwargs
        self.losses: list[Tensor] = []

    def __call__(self, logits: Tensor) -> Tensor:
        """Cross-entropy of logits (B, T, V)."""
        return self.model.loss_function(logits=logits, labels=self.labels, vocab_size=logits.shape[-1], **self.kwargs)

    def record(self, index: int, state: Tensor, energy: Tensor) -> None:
        """Called by the descent after each step."""
        self.losses.append(self(state))

    def objective(self) -> Tensor:
        """What training minimises."""
        return torch.stack(self.losses).mean() if self.loss_on_steps == "all" else self.losses[-1]

    def stacked(self) -> Tensor | None:
        """The loss after each step (K,), detached; None when none was recorded."""
        return torch.stack(self.losses).detach() if self.losses else None

    def labelled(self, shape: torch.Size) -> Tensor | None:
        """Which positions have a label, (B, T); None when the logits cover other positions than the labels."""
        labels: Tensor | None = self.kwargs.get("shift_labels")
        if labels is None and self.labels is not None:
            labels = F.pad(self.labels, (0, 1), value=-100)[..., 1:]
        return (labels != -100) if labels is not None and labels.shape == shape else None


__all__ = ["StepLosses", "perplexity"]
