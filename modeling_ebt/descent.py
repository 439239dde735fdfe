"""
The one descent: a prediction is found by following the gradient of an energy.

Pure functions over tensors; this file imports torch alone and knows no modality. Shapes: ``B`` rows, ``N`` candidates
of a row (positions x candidates for text), ``...`` whatever a state is made of (logits over a vocabulary, pixels),
``K`` steps. Symbols of arXiv 2507.02092: state [y-hat], energy [E], step size [alpha], noise [eta ~ N(0, sigma)].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


EnergyFunction = Callable[[Tensor, int], Tensor]


class CandidateSpace(Protocol):
    """How a state becomes what the energy sees, and how a gradient there moves the state."""

    def point(self, state: Tensor) -> Tensor:
        """The candidate itself: a distribution for logits, the image for an image. Same leading shape as `state`."""

    def embed(self, point: Tensor) -> Tensor:
        """What the energy function takes."""

    def update(self, state: Tensor, point: Tensor, gradient: Tensor, step_size: Tensor | float) -> Tensor:
        """The next state, given the gradient of the energy with respect to `embed(point)`."""


@dataclass(frozen=True)
class DescentStep:
    """
    One step of a schedule.

    Args:
        landscape (`int`): which energy landscape to descend.
        step_size (`Tensor` or `float`): [alpha]; a tensor broadcasts against the gradient and may require grad.
        noise_std (`float`): standard deviation of the noise added to the state before the step [sigma].
    """

    landscape: int
    step_size: Tensor | float
    noise_std: float = 0.0


@dataclass
class DescentOutput:
    """
    Result of [`descend`].

    Args:
        state (`Tensor`): the final state, shape of the initial one.
        energies (`list[Tensor]`): the energy before every step (K tensors of the energy's shape), and after the last
            one if it was asked for (then K + 1). A row that stopped repeats its last energy.
        steps_taken (`Tensor`): integer tensor of the energy's shape, the steps that moved each row.
    """

    state: Tensor
    energies: list[Tensor]
    steps_taken: Tensor


def standard_normal(
    shape: Sequence[int], generator: torch.Generator | None, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The one source of Gaussian randomness of the descent; `generator=None` uses torch's global one."""
    return torch.randn(tuple(shape), generator=generator, device=device, dtype=dtype)


def _over_state(mask: Tensor, state: Tensor) -> Tensor:
    """A mask of the energy's shape, broadcastable over a state."""
    return mask.reshape(mask.shape + (1,) * (state.dim() - mask.dim()))


def energy_and_gradient(
    energy: EnergyFunction, space: CandidateSpace, point: Tensor, landscape: int, create_graph: bool
) -> tuple[Tensor, Tensor]:
    """
    Energy of a candidate and its gradient with respect to the embedded candidate.

    Rows are independent of one another, so the gradient of the sum of all energies is every row's own gradient. Works
    under `torch.no_grad()`; with `create_graph=False` both results are detached.
    """
    with torch.enable_grad():
        if create_graph:
            embedded = space.embed(point)
            if not embedded.requires_grad:
                embedded.requires_grad_(True)
        else:
            with torch.no_grad():
                embedded = space.embed(point)
            embedded = embedded.detach().requires_grad_(True)
        energies = energy(embedded, landscape)
        (gradient,) = torch.autograd.grad(energies.sum(), embedded, create_graph=create_graph)
    return (energies, gradient) if create_graph else (energies.detach(), gradient.detach())


def descend(
    energy: EnergyFunction,
    space: CandidateSpace,
    state: Tensor,
    schedule: Sequence[DescentStep],
    *,
    detach_between_steps: bool = True,
    graph_on_steps: str = "none",
    accept_only_lower_energy: bool = False,
    tolerance: float | None = None,
    target_energy: float | None = None,
    final_energy: bool = False,
    generator: torch.Generator | None = None,
    checkpoint: Callable | None = None,
    on_step: Callable[[int, Tensor, Tensor], None] | None = None,
) -> DescentOutput:
    """
    Follows the energy downhill from `state` (Alg. 1 of the paper).

    Args:
        energy (`Callable`): `(embedded candidate, landscape) -> energies`, one scalar for each row, independent of the
            other rows.
        space (`CandidateSpace`): the modality: what a state means and how it moves.
        state (`Tensor`): initial state; kept in its own dtype, so give it in float32.
        schedule (`Sequence[DescentStep]`): the steps.
        detach_between_steps (`bool`): a step's parameter gradient does not reach earlier steps.
        graph_on_steps (`"none"`, `"last"` or `"all"`): the steps differentiable with respect to the parameters. On the
            others the gradient of the energy is a constant, and only the step size and the state carry gradient.
        accept_only_lower_energy (`bool`): a row keeps its state where a step would not lower its energy.
        tolerance (`float`, *optional*): a row stops for good when its energy changed by at most this much during one
            step on an unchanged landscape; the other rows go on, and never feel it.
        target_energy (`float`, *optional*): a row stops for good once its energy is at most this, before its first
            step too.
        final_energy (`bool`): also report the energy of the returned state, on the last landscape (one more forward).
        generator (`torch.Generator`, *optional*): source of the noise.
        checkpoint (`Callable`, *optional*): `torch.utils.checkpoint`-like wrapper, recomputes a step in the backward
            pass.
        on_step (`Callable`, *optional*): called with (index, state after the step, energy before it).

    Returns:
        [`DescentOutput`].
    """
    if not schedule:
        raise ValueError("A descent needs at least one step, got an empty schedule.")
    if graph_on_steps not in ("none", "last", "all"):
        raise ValueError(f"`graph_on_steps` must be none, last or all, got {graph_on_steps!r}.")

    stops = tolerance is not None or target_energy is not None
    energies: list[Tensor] = []
    moves: list[Tensor] = []
    after: Tensor | None = None
    for index, step in enumerate(schedule):
        create_graph = graph_on_steps == "all" or (graph_on_steps == "last" and index == len(schedule) - 1)
        if detach_between_steps:
            state = state.detach()
        start = state
        if step.noise_std > 0:
            start = state + step.noise_std * standard_normal(state.shape, generator, state.device, state.dtype)

        def move(start: Tensor, step: DescentStep = step, create_graph: bool = create_graph) -> tuple[Tensor, Tensor]:
            point = space.point(start)
            seen = point if create_graph else point.detach()
            value, gradient = energy_and_gradient(energy, space, seen, step.landscape, create_graph)
            return space.update(start, point, gradient, step.step_size), value

        proposal, value = move(start) if checkpoint is None or not create_graph else checkpoint(move, start)

        if index == 0:
            active = torch.ones_like(value, dtype=torch.bool)
        elif stops:
            # a row that stopped earlier repeats its last energy; one that stops now reports that of the state it keeps
            value = torch.where(active, value, energies[-1])
            if tolerance is not None and step.landscape == schedule[index - 1].landscape:
                active = active & ((energies[-1] - value).abs() > tolerance)
        if target_energy is not None:
            active = active & (value > target_energy)
        if stops and not active.any():
            # every row has come to rest: the remaining steps would change nothing
            energies += [value] * (len(schedule) - index)
            moves.append(active)
            if on_step is not None:
                for rest in range(index, len(schedule)):
                    on_step(rest, state, value)
            break
        energies.append(value)

        moved = active
        after = None
        if accept_only_lower_energy:
            with torch.no_grad():
                after = energy(space.embed(space.point(proposal)), step.landscape)
            moved = active & (after < value)
            after = torch.where(moved, after, value)
        if accept_only_lower_energy or stops:
            proposal = torch.where(_over_state(moved, state), proposal, state)
        state = proposal
        moves.append(moved)
        if on_step is not None:
            on_step(index, state, value)

    if final_energy:
        # noise: what a step was judged by is not the energy of a state it left unmoved
        if after is None or any(step.noise_std > 0 for step in schedule):
            with torch.no_grad():
                after = energy(space.embed(space.point(state)), schedule[-1].landscape)
        energies.append(after)
    return DescentOutput(state=state, energies=energies, steps_taken=torch.stack(moves).sum(0))


__all__ = ["CandidateSpace", "DescentOutput", "DescentStep", "descend", "energy_and_gradient", "standard_normal"]
