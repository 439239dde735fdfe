"""
When candidates stop moving, and how those that stopped are left out of the computation. Not in the paper.

Shapes as in `descent.py`: ``B`` rows, ``N`` candidates of a row, ``R`` and ``n`` what is left of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


EnergyFunction = Callable[[Tensor, int], Tensor]
Index = tuple[Tensor, Tensor]

# candidates are left out once no more than this share of the work would remain
WORTH_NARROWING = 0.75
# the same where leaving rows out means copying the keys of the others (with 32 rows, context 256, xxs and 8 steps the
# time is 0.94 of what it was with half of them left, 0.64 with a quarter, 0.52 with an eighth)
WORTH_COPYING = 0.3


def over_state(mask: Tensor, state: Tensor) -> Tensor:
    """A mask of the energy's shape, broadcastable over a state."""
    return mask.reshape(mask.shape + (1,) * (state.dim() - mask.dim()))


@dataclass(frozen=True)
class StopRules:
    """
    When a candidate stops for good. Whatever the rule, the other candidates go on and never feel it.

    Args:
        tolerance (`float`, *optional*): when its energy changed by at most this much during a step on an unchanged
            landscape.
        target_energy (`float`, *optional*): once its energy is at most this, before its first step too.
        stable (`Callable`, *optional*): `(state after a step, state before it) -> bool` of the energy's shape, asked
            after every step that the next one would follow on the same landscape.
        step_limits (`Tensor`, *optional*): integers of the energy's shape, at least 1: after so many steps.
        prune_after (`int`, *optional*): the step after which candidates are given up, at least 1.
        prune (`Callable`, *optional*): `(energies of the start, energies now) -> bool`, True for those to keep.
    """

    tolerance: float | None = None
    target_energy: float | None = None
    stable: Callable[[Tensor, Tensor], Tensor] | None = None
    step_limits: Tensor | None = None
    prune_after: int | None = None
    prune: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def given(self) -> bool:
        """Whether there is any rule."""
        return self.by_energy or self.by_step or self.prune is not None

    @property
    def by_energy(self) -> bool:
        """Whether a candidate may stop with its energy known."""
        return self.tolerance is not None or self.target_energy is not None

    @property
    def by_step(self) -> bool:
        """Whether a candidate may stop right after a step, its energy not computed yet."""
        return self.stable is not None or self.step_limits is not None

    def goes_on(self, energy: Tensor, previous: Tensor | None) -> Tensor:
        """Where an energy is neither low enough nor at rest; `previous` is None where it cannot be compared."""
        moving = torch.ones_like(energy, dtype=torch.bool)
        if self.tolerance is not None and previous is not None:
            moving = (previous - energy).abs() > self.tolerance
        return moving if self.target_energy is None else moving & (energy > self.target_energy)


@dataclass(frozen=True)
class Narrowing:
    """
    How to compute fewer candidates.

    Args:
        energy (`Callable`): `(rows (R, 1), columns (R, n)) -> energy function` of those of all candidates.
        rows_worth (`float`, *optional*): whole rows are left out once no more than this share of the work would
            remain.
    """

    energy: Callable[[Index], EnergyFunction]
    rows_worth: float = WORTH_NARROWING


@dataclass(frozen=True)
class Part:
    """
    The candidates a step is computed for: all of them, or a rectangle of the grid (B, N).

    Args:
        energy (`Callable`): the energy function of these candidates.
        narrow ([`Narrowing`], *optional*): how to compute fewer of all candidates.
        index (`tuple` of two `Tensor`, *optional*): their rows (R, 1) and columns (R, n); None for all.
    """

    energy: EnergyFunction
    narrow: Narrowing | None = None
    index: Index | None = None

    def take(self, everything: Tensor) -> Tensor:
        """(B, N, ...) -> (R, n, ...)."""
        return everything if self.index is None else everything[self.index]

    def put(self, everything: Tensor, part: Tensor, where: Tensor, in_place: bool = False) -> Tensor:
        """`everything` (B, N, ...) with what belongs to those of this part (R, n, ...) that are `where` (R, n)."""
        if self.index is None:
            return torch.where(over_state(where, everything), part, everything)
        rows, columns = self.index
        target = everything if in_place else everything.clone()
        target[rows.expand_as(columns)[where], columns[where]] = part[where]
        return target

    def narrowed(self, active: Tensor) -> "Part":
        """
        The active ones (B, N), and as many others as make all rows equally long. This part itself where that would
        save little.
        """
        if self.narrow is None:
            return self
        size = active.numel() if self.index is None else self.index[1].numel()
        rows, width = active.any(1).nonzero(), int(active.sum(1).max())
        if len(rows) * width > self.narrow.rows_worth * size:
            rows = torch.arange(len(active), device=active.device)[:, None]
            if len(rows) * width > WORTH_NARROWING * size:
                return self
        columns = active[rows[:, 0]].int().argsort(dim=1, descending=True, stable=True)[:, :width]
        return Part(self.narrow.energy((rows, columns)), self.narrow, (rows, columns))


__all__ = [
    "WORTH_COPYING",
    "WORTH_NARROWING",
    "EnergyFunction",
    "Index",
    "Narrowing",
    "Part",
    "StopRules",
    "over_state",
]
