"""The training objective: a loss after every step of a descent, and what training makes of them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss


def perplexity(mean_loss: float) -> float:
    """exp(mean loss), infinite where a float cannot hold it."""
    return math.exp(mean_loss) if mean_loss < 700 else math.inf


class StepLosses(ABC):
    """
    The loss after every thinking step; subclasses say which loss.

    Args:
        loss_on_steps (`str`): `"all"` scores the mean over steps (recipe s1), `"last"` the last step (recipe s2).
    """

    def __init__(self, loss_on_steps: str) -> None:
        self.loss_on_steps = loss_on_steps
        self.losses: list[Tensor] = []

    @abstractmethod
    def __call__(self, state: Tensor) -> Tensor:
        """The loss of one state."""

    def record(self, index: int, state: Tensor, energy: Tensor) -> None:
        """Called by the descent after each step."""
        self.losses.append(self(state))

    def objective(self) -> Tensor:
        """What training minimises."""
        return torch.stack(self.losses).mean(0) if self.loss_on_steps == "all" else self.losses[-1]

    def stacked(self) -> Tensor | None:
        """The loss after each step (K,), detached; None when none was recorded."""
        return torch.stack(self.losses).detach() if self.losses else None


class TextStepLosses(StepLosses):
    """
    Cross-entropy after every thinking step, by transformers' own causal loss.

    Args:
        model (`PreTrainedModel`): whose `loss_function` is used.
        labels (`Tensor` of shape `(B, T)`, *optional*): tokens, shifted by the loss, -100 ignored.
        loss_on_steps (`str`): see [`StepLosses`].
        kwargs (`dict`): `num_items_in_batch`, `shift_labels` and `loss_reduction` of the loss; the last is `"mean"`
            (default) or `"none"`, which keeps the losses of all tokens apart, `(B, T)`.

    Raises:
        ValueError: for another `loss_reduction`, or one that contradicts `num_items_in_batch`.
    """

    def __init__(
        self, model: PreTrainedModel, labels: Tensor | None, loss_on_steps: str, kwargs: dict[str, Any]
    ) -> None:
        super().__init__(loss_on_steps)
        self.proposal: Tensor | None = None
        self.taken: Tensor | None = None
        self.proposal_weight = 0.0
        self.model = model
        self.labels = labels
        reduction = kwargs.get("loss_reduction") or "mean"
        if reduction not in ("mean", "none"):
            raise ValueError(f"`loss_reduction` must be 'mean' or 'none', got {reduction!r}.")
        self.by_token = reduction == "none"
        if self.by_token and kwargs.get("num_items_in_batch") is not None:
            raise ValueError(
                "`num_items_in_batch` divides a sum, and `loss_reduction='none'` has none. Give one of them."
            )
        self.kwargs = {name: value for name, value in kwargs.items() if name != "loss_reduction"}

    def __call__(self, state: Tensor) -> Tensor:
        """Cross-entropy of logits (B, T, V): a mean, or (B, T) by token."""
        if self.by_token:
            targets = self.targets().to(state.device)
            return F.cross_entropy(state.float().flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        return self.model.loss_function(logits=state, labels=self.labels, vocab_size=state.shape[-1], **self.kwargs)

    @property
    def is_plain(self) -> bool:
        """Whether it is nothing but the cross-entropy of labelled tokens, as a mean or divided by a given number."""
        own = self.model.loss_function is ForCausalLMLoss and not self.by_token
        return own and set(self.kwargs) <= {"num_items_in_batch", "shift_labels"}

    def items(self) -> Tensor | int:
        """What a sum of cross-entropies is divided by, for a plain loss."""
        given: Tensor | int | None = self.kwargs.get("num_items_in_batch")
        if given is None:
            return (self.targets() != -100).sum()
        return given

    def take(self, losses: Tensor, objective: Tensor) -> None:
        """Takes over losses (K,) and their objective from a descent that computed them itself."""
        self.losses, self.taken = list(losses), objective

    def record_proposal(self, state: Tensor, weight: float) -> None:
        """Takes the loss of the logits (B, T, V) the descent starts from; it counts this much in the objective."""
        self.proposal, self.proposal_weight = self(state), weight

    def objective(self) -> Tensor:
        """What training minimises: that of the steps, and the proposal's own loss."""
        if self.proposal is None:
            return self._of_steps()
        own = self.proposal_weight * self.proposal
        return own + self._of_steps() if self.losses else own

    def _of_steps(self) -> Tensor:
        return super().objective() if self.taken is None else self.taken

    def targets(self) -> Tensor:
        """The token that every position should predict, (B, T), or -100."""
        shifted: Tensor | None = self.kwargs.get("shift_labels")
        if shifted is None:
            assert self.labels is not None  # there are no losses without either
            shifted = F.pad(self.labels, (0, 1), value=-100)[..., 1:]
        return shifted

    def labelled(self, shape: torch.Size) -> Tensor | None:
        """Which positions have a label, (B, T); None when the logits cover other positions than the labels."""
        targets = self.targets()
        return (targets != -100) if targets.shape == shape else None


RECONSTRUCTIONS: dict[str, Callable[..., Tensor]] = {
    "smooth_l1": F.smooth_l1_loss,
    "mse": F.mse_loss,
    "l1": F.l1_loss,
}


class ImageStepLosses(StepLosses):
    """
    Distance to the clean image after every thinking step.

    Args:
        clean (`Tensor` of shape `(B, C, H, W)`): what every image should become.
        kind (`str`): `"smooth_l1"`, `"mse"` or `"l1"`.
        loss_on_steps (`str`): see [`StepLosses`].
        num_items (`int` or `Tensor`, *optional*): pixels of all accumulated batches, to divide the sum by; the mean
            over this batch without it.
    """

    def __init__(self, clean: Tensor, kind: str, loss_on_steps: str, num_items: int | Tensor | None = None) -> None:
        super().__init__(loss_on_steps)
        self.clean = clean.float()
        self.distance = RECONSTRUCTIONS[kind]
        self.num_items = num_items

    def __call__(self, state: Tensor) -> Tensor:
        """Distance of images (B, C, H, W)."""
        if self.num_items is None:
            return self.distance(state, self.clean)
        return self.distance(state, self.clean, reduction="sum") / self.num_items


__all__ = ["ImageStepLosses", "StepLosses", "TextStepLosses", "perplexity"]
