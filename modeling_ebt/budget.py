"""A budget of thinking steps for a whole text, spent from left to right. Not in the paper."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepBudget:
    """
    Steps that the tokens of a text share: each takes what it wants as long as that is left, and one when nothing is.

    Args:
        total (`int`): steps for each text.
        texts (`torch.LongTensor` of shape `(B or 1, T)`): which text of its row a position belongs to.
        spent (`torch.LongTensor` of shape `(B,)`): steps that earlier tokens have used.

    Example:

    ```python
    >>> import torch
    >>> from ebt_transformers.modeling_ebt.budget import StepBudget

    >>> budget = StepBudget.of_call(6, None, batch=1, position_ids=torch.tensor([[0, 1, 2, 3]]))
    >>> limits, spent = budget.share(torch.tensor([[2, 4, 4, 4]]))  # the steps they would take
    >>> limits.tolist(), spent.tolist()
    ([[6, 4, 1, 1]], [[2, 6, 7, 8]])
    ```
    """

    total: int
    texts: Tensor
    spent: Tensor

    @classmethod
    def of_call(cls, total: int | None, spent: Tensor | None, batch: int, position_ids: Tensor) -> "StepBudget":
        """
        The budget of one call.

        Args:
            total (`int`, *optional*): steps for each text.
            spent (`torch.LongTensor` of shape `(B,)`, *optional*): what earlier calls have used; nothing by default.
            batch (`int`): B.
            position_ids (`torch.LongTensor` of shape `(B or 1, T)`): where they do not rise a text begins, or there is
                padding, which so takes nothing from anybody.

        Raises:
            ValueError: for `spent` of another shape, or without a budget.
        """
        if total is None:
            raise ValueError("`steps_spent` counts steps of a budget: give `thinking_budget`, too.")
        if spent is None:
            spent = torch.zeros(batch, dtype=torch.long, device=position_ids.device)
        elif tuple(spent.shape) != (batch,):
            raise ValueError(
                f"`steps_spent` must have shape ({batch},), one number for each row, got {tuple(spent.shape)}."
            )
        begins = position_ids[:, 1:] <= position_ids[:, :-1]
        return cls(total, torch.nn.functional.pad(begins.cumsum(-1), (1, 0)), spent.to(position_ids.device))

    def keep(self, positions: Tensor | slice) -> "StepBudget":
        """The same budget for some of the positions only."""
        return replace(self, texts=self.texts[:, positions])

    def share(self, wanted: Tensor, candidates: int = 1) -> tuple[Tensor, Tensor]:
        """
        Who may take how many steps.

        Args:
            wanted (`torch.LongTensor` of shape `(B, M T)`): steps each candidate would take, candidate-major; of those
                of a position the one that wants most counts.
            candidates (`int`, *optional*, defaults to 1): M.

        Returns:
            The most steps of each position (B, T), at least 1, and the steps spent up to and with it (B, T).
        """
        limits, totals, total = [], [], self.spent
        for index, steps in enumerate(wanted.unflatten(1, (candidates, -1)).amax(1).unbind(1)):
            if index > 0:
                total = torch.where(self.texts[:, index] == self.texts[:, index - 1], total, self.spent)
            limits.append((self.total - total).clamp(min=1))
            total = total + torch.minimum(limits[-1], steps)
            totals.append(total)
        return torch.stack(limits, 1), torch.stack(totals, 1)


__all__ = ["StepBudget"]
