"""
The one descent: a prediction is found by following the gradient of an energy.

Pure functions over tensors; this file needs nothing but torch and `stopping.py`, and knows no modality. Shapes: ``B``
rows, ``N`` candidates of a row (positions x candidates for text), ``...`` whatever a state is made of (logits over a
vocabulary, pixels), ``K`` steps. Symbols of arXiv 2507.02092: state [y-hat], energy [E], step size [alpha], noise
[eta ~ N(0, sigma)].
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .stopping import EnergyFunction, Narrowing, Part, StopRules


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
        steps_tried (`Tensor`): the same, rejected steps included.
        kept (`Tensor`, *optional*): False for the rows that were given up; None if none could be.
    """

    state: Tensor
    energies: list[Tensor]
    steps_taken: Tensor
    steps_tried: Tensor
    kept: Tensor | None = None


NOISE_BLOCK = 2**20  # numbers that one thread draws; torch draws with one thread only


def standard_normal(
    shape: Sequence[int],
    generator: torch.Generator | None,
    device: torch.device,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """
    The one source of Gaussian randomness of the descent.

    Args:
        shape (sequence of `int`): of the result.
        generator (`torch.Generator`, *optional*): torch's global one by default.
        device (`torch.device`), dtype (`torch.dtype`): of the result.
        out (`Tensor`, *optional*): contiguous, where to put it.

    Returns:
        A tensor of independent draws. On a CPU many numbers are drawn in blocks, side by side, each with a generator
        of its own: the same whatever the number of threads.
    """
    drawn = torch.empty(tuple(shape), device=device, dtype=dtype) if out is None else out.view(tuple(shape))
    if drawn.device.type != "cpu" or drawn.numel() < 2 * NOISE_BLOCK:
        return drawn.normal_(generator=generator)
    blocks = drawn.view(-1).split(NOISE_BLOCK)
    seeds = torch.randint(2**62, (len(blocks),), generator=generator).tolist()

    def draw(block: Tensor, seed: int) -> None:
        block.normal_(generator=torch.Generator().manual_seed(seed))

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(draw, blocks, seeds))
    return drawn


def energy_and_gradient(
    energy: EnergyFunction, space: CandidateSpace, point: Tensor, landscape: int, create_graph: bool
) -> tuple[Tensor, Tensor]:
    """
    Energy of a candidate and its gradient with respect to the embedded candidate.

    Rows are independent of one another, so the gradient of the sum of all energies is every row's own gradient. Works
    under `torch.no_grad()`; with `create_graph=False` both results are detached. An energy that knows its gradient in
    closed form says so with a method `with_gradient(embedded, landscape) -> (energies, gradient)`.
    """
    closed_form = getattr(energy, "with_gradient", None)
    if closed_form is not None:
        with torch.set_grad_enabled(create_graph):
            return closed_form(space.embed(point), landscape)
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


@dataclass
class _Walk:
    """
    A descent under way.

    Args:
        state (`Tensor`): the states of all candidates.
        everything, part ([`Part`]): all candidates, and those that are still computed.
        energies (`list[Tensor]`): before every step so far.
        accepted (`Tensor`, *optional*): where the last step could be rejected, the energies after it.
        kept (`Tensor`, *optional*): False for those given up.

    From the first energy on, and of its shape:
        active, at_rest (`Tensor`): True for those that have not stopped, and for those whose energy stopped them.
        latest (`Tensor`): the last energy computed for each.
        taken, tried (`Tensor`): counts of steps.
    """

    state: Tensor
    everything: Part
    part: Part
    energies: list[Tensor] = field(default_factory=list)
    accepted: Tensor | None = None
    kept: Tensor | None = None
    active: Tensor = field(init=False)
    at_rest: Tensor = field(init=False)
    latest: Tensor = field(init=False)
    taken: Tensor = field(init=False)
    tried: Tensor = field(init=False)

    def energy_now(self, space: CandidateSpace, landscape: int, among: Tensor | None = None) -> Tensor:
        """The energies of the states as they are; with `among`, of those, and the latest known of the others."""
        part = self.everything if among is None else self.everything.narrowed(among)
        with torch.no_grad():
            energies = part.energy(space.embed(space.point(part.take(self.state))), landscape)
        return energies if among is None else part.put(self.latest, energies, part.take(among))

    def leave_out(self, index: int, landscape: int, stop: StopRules, space: CandidateSpace) -> None:
        """Before a step: gives up the hopeless, and computes no more what has stopped."""
        if index == stop.prune_after:
            self.give_up(landscape, stop, space)
        if stop.step_limits is not None:
            self.active = self.active & (stop.step_limits > index)
        if self.active.any():
            self.part = self.part.narrowed(self.active)

    def give_up(self, landscape: int, stop: StopRules, space: CandidateSpace) -> None:
        """Keeps the candidates that the rules say, by the energies of their states now."""
        assert stop.prune is not None  # the two go together
        self.kept = stop.prune(self.energies[0], self.energy_now(space, landscape))
        self.active = self.active & self.kept

    def judge(self, value: Tensor, stop: StopRules, comparable: bool) -> Tensor:
        """Takes note of the energies of this part; returns which of its candidates go on."""
        if not self.energies:
            self.latest, self.active = value, torch.ones_like(value, dtype=torch.bool)
            self.at_rest = torch.zeros_like(self.active)
            self.taken = self.tried = torch.zeros_like(value, dtype=torch.long)
        here = self.part.take(self.active)
        if not stop.given:
            self.latest = value
            return here
        # who stopped earlier repeats its last energy; who stops now reports that of the state it keeps
        previous = self.part.take(self.latest) if comparable else None
        self.latest = self.part.put(self.latest, value, here)
        if not stop.by_energy:
            return here
        goes_on = here & stop.goes_on(value, previous)
        self.active = self.part.put(self.active, goes_on, here)
        self.at_rest = self.part.put(self.at_rest, ~goes_on, here)
        return goes_on

    def move(self, proposal: Tensor, tried: Tensor, moved: Tensor, in_place: bool) -> None:
        """Takes over the proposals of this part where it `moved`."""
        self.state = self.part.put(self.state, proposal, moved, in_place)
        self.taken = self.part.put(self.taken, self.part.take(self.taken) + 1, moved)
        self.tried = self.part.put(self.tried, self.part.take(self.tried) + 1, tried)

    def finish(self, schedule: Sequence[DescentStep], stop: StopRules, space: CandidateSpace, final: bool) -> None:
        """After the last step: what was put off because all had stopped, and the energies of the end."""
        if stop.prune_after is not None and self.kept is None and stop.prune_after < len(schedule):
            self.give_up(schedule[stop.prune_after].landscape, stop, space)
        if not final:
            return
        after = self.accepted
        # noise: what a step was judged by is not the energy of a state it left unmoved
        if after is None or stop.by_step or stop.prune is not None or any(step.noise_std > 0 for step in schedule):
            after = self.energy_now(space, schedule[-1].landscape, self.kept)
        if stop.by_step:
            # those that stopped with their energy unknown report the one they end with
            unknown = [~self.at_rest & (self.tried <= index) for index in range(len(schedule))]
            pairs = zip(unknown, self.energies, strict=True)
            self.energies = [torch.where(late, after, energies) for late, energies in pairs]
        self.energies.append(after)


def descend(
    energy: EnergyFunction,
    space: CandidateSpace,
    state: Tensor,
    schedule: Sequence[DescentStep],
    *,
    detach_between_steps: bool = True,
    graph_on_steps: str = "none",
    accept_only_lower_energy: bool = False,
    stop: StopRules | None = None,
    narrow: Narrowing | None = None,
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
        stop ([`StopRules`], *optional*): when a row stops for good; by default none does.
        narrow ([`Narrowing`], *optional*): how to compute fewer candidates, for energies (B, N) and step sizes that
            all share. With it, candidates that stopped are left out where that pays.
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

    stop = stop or StopRules()
    everything = Part(energy, narrow)
    walk = _Walk(state, everything, everything)
    reached = len(schedule)
    for index, step in enumerate(schedule):
        create_graph = graph_on_steps == "all" or (graph_on_steps == "last" and index == len(schedule) - 1)
        if detach_between_steps:
            walk.state = walk.state.detach()
        if index > 0 and stop.given:
            walk.leave_out(index, step.landscape, stop, space)
            if not walk.active.any():
                reached = index
                break
        before = walk.part.take(walk.state)
        start = before
        if step.noise_std > 0:
            # drawn for all rows, so that nobody's noise depends on who has stopped
            noise = standard_normal(walk.state.shape, generator, state.device, state.dtype)
            start = before + step.noise_std * walk.part.take(noise)

        def move(start: Tensor, step: DescentStep = step, create_graph: bool = create_graph) -> tuple[Tensor, Tensor]:
            point = space.point(start)
            seen = point if create_graph else point.detach()
            value, gradient = energy_and_gradient(walk.part.energy, space, seen, step.landscape, create_graph)
            return space.update(start, point, gradient, step.step_size), value

        proposal, value = move(start) if checkpoint is None or not create_graph else checkpoint(move, start)
        comparable = index > 0 and step.landscape == schedule[index - 1].landscape
        here = walk.judge(value, stop, comparable)
        if stop.given and not walk.active.any():
            # every row has come to rest: the remaining steps would change nothing
            reached = index
            break
        walk.energies.append(walk.latest)
        moved = here
        if accept_only_lower_energy:
            with torch.no_grad():
                after = walk.part.energy(space.embed(space.point(proposal)), step.landscape)
            moved = here & (after < value)
            walk.accepted = walk.part.put(walk.latest, after, moved)
        if accept_only_lower_energy or stop.given:
            # nobody but an observer keeps a state that was
            walk.move(proposal, here, moved, in_place=on_step is None)
        else:
            walk.state, walk.taken, walk.tried = proposal, walk.taken + 1, walk.tried + 1
        if stop.stable is not None and index + 1 < len(schedule) and schedule[index + 1].landscape == step.landscape:
            walk.active = walk.part.put(walk.active, ~stop.stable(walk.part.take(walk.state), before), here)
        if on_step is not None:
            on_step(index, walk.state, walk.latest)

    walk.energies += [walk.latest] * (len(schedule) - reached)
    for index in range(reached, len(schedule)):
        if on_step is not None:
            on_step(index, walk.state, walk.latest)
    walk.finish(schedule, stop, space, final_energy)
    return DescentOutput(walk.state, walk.energies, walk.taken, walk.tried, walk.kept)


__all__ = [
    "CandidateSpace",
    "DescentOutput",
    "DescentStep",
    "StopRules",
    "descend",
    "energy_and_gradient",
    "standard_normal",
]
