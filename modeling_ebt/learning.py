"""
Learning to think, a few candidates at a time: the training step of the language model.

Candidates are independent of one another, and steps that are detached from one another need no graph between them. So
a chunk of candidates walks its whole descent, every step is differentiated as soon as its loss is known, and nothing
of it is kept: besides the logits, memory holds what is V-sized and what is second-order of one chunk, whatever the
batch.

The V-sized work is done in closed form. With `z' = p - m W^T` the logits after a step of the move `m` [alpha dE/dc],
`p' = softmax(z')` and `t` the right token, the cross-entropy has the gradient `G = p' - onehot(t)`. Hence

- `dL/dm = -G W = -(p' W - W[t])`: the next step embeds `p' W` anyway, so the gradient of the loss costs no product;
- `dL/dW` has the part `-G^T m` of this step and `p'^T dL/dc'` of the next one: one product, with `dL/dc' - m`.

A descent of K steps thus takes 3 K + 2 products with the table instead of 5 K.

Shapes: ``B`` rows, ``T`` positions, ``n = r s`` candidates of a chunk, its rows and positions, ``V`` vocabulary, ``D``
width, ``K`` steps.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .candidates import TextCandidates
from .descent import DescentOutput, DescentStep, descend
from .outputs import EBTContext
from .second_order import differentiate


EnergyOfContext = Callable[[Tensor, EBTContext, int], Tensor]
Leaf = tuple[Tensor, Callable[[Tensor], Any]]  # a tensor to differentiate in, and what takes its gradient


def chunks(rows: int, positions: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Splits a grid (rows, positions) into blocks of whole rows, or of parts of one row, of at most `size` each."""
    together = max(1, size // positions)
    length = min(size, positions)
    for row in range(0, rows, together):
        for position in range(0, positions, length):
            yield slice(row, min(row + together, rows)), slice(position, min(position + length, positions))


class _Sum:
    """The gradient of a tensor, added up; in float32 where the tensor itself has less."""

    def __init__(self, of: Tensor) -> None:
        self.of = of
        self.dtype = torch.promote_types(of.dtype, torch.float32)
        self.total: Tensor | None = None

    def whole(self) -> Tensor:
        """The sum so far, to be added to in place."""
        if self.total is None:
            self.total = torch.zeros_like(self.of, dtype=self.dtype, memory_format=torch.contiguous_format)
        return self.total

    def add(self, gradient: Tensor) -> None:
        """Adds a gradient of the whole tensor."""
        if self.total is None:
            self.total = gradient.to(self.dtype)
        else:
            self.total += gradient

    def result(self) -> Tensor | None:
        """The sum in the tensor's own precision; None if there was nothing to add."""
        return None if self.total is None else self.total.to(self.of.dtype)


class _Pupil:
    """
    What a training step learns: the gradients of the model's parts, added up over chunks and steps.

    Args:
        energy (`Callable`): `(embedded candidates (r, s, D), context, landscape) -> energies (r, s)`.
        parameters (sequence of `Tensor`): what the energy is made of.
        space ([`TextCandidates`]): the table [W] (V, D) and the rule of the update.
        context ([`EBTContext`]): of all candidates.
        schedule (sequence of [`DescentStep`]): the steps.
        second_order (`str`): how a step is differentiated, see [`EBTConfig`].
    """

    def __init__(
        self,
        energy: EnergyOfContext,
        parameters: Sequence[Tensor],
        space: TextCandidates,
        context: EBTContext,
        schedule: Sequence[DescentStep],
        second_order: str,
    ) -> None:
        self.energy, self.parameters, self.second_order = energy, parameters, second_order
        self.context, self.table, self.update_rule = context, space.table, space.update_rule
        device = self.table.device.type
        self.low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.table.dtype
        self.weights = self.table.detach().to(self.low)
        sizes = [step.step_size for step in schedule]
        everything = (*parameters, self.table, *context.keys, *context.values, context.anchors, *sizes)
        learning = [each for each in everything if isinstance(each, Tensor) and each.requires_grad]
        self.sums = {id(each): _Sum(each) for each in learning}
        self.leaves: list[Leaf] = [(each, self.sums[id(each)].add) for each in parameters if id(each) in self.sums]
        self.schedule = [replace(step, step_size=self._size(step.step_size)) for step in schedule]

    def _size(self, size: Tensor | float) -> Tensor | float:
        """A step size as a leaf, whatever it was made of."""
        if not isinstance(size, Tensor):
            return size
        leaf = size.detach().requires_grad_(size.requires_grad)
        if leaf.requires_grad:
            self.leaves.append((leaf, self.sums[id(size)].add))
        return leaf

    def inputs(self) -> list[Tensor]:
        """Everything that learns."""
        return [each.of for each in self.sums.values()]

    def gradients(self) -> list[Tensor | None]:
        """Of [`inputs`], in their order."""
        return [each.result() for each in self.sums.values()]

    def embed(self, share: Tensor) -> Tensor:
        """`p W` (n, D), in the precision of products."""
        # products are in the precision they are given in, whether or not autocast is on
        return share.to(self.low) @ self.weights

    def project(self, base: Tensor, move: Tensor, out: Tensor) -> None:
        """`out = base - m W^T` (n, V)."""
        if self.low == base.dtype:
            torch.addmm(base, move, self.weights.t(), alpha=-1, out=out)
        else:
            torch.sub(base, move.to(self.low) @ self.weights.t(), out=out)

    def table_learns(self, share: Tensor, rows: Tensor) -> None:
        """Adds `p^T rows` to the gradient of the table."""
        found = self.sums.get(id(self.table))
        if found is None:
            return
        if self.low == share.dtype:
            found.whole().addmm_(share.t(), rows.to(self.low))
        else:
            found.whole().add_(share.to(self.low).t() @ rows.to(self.low))

    def table_learns_at(self, tokens: Tensor, rows: Tensor) -> None:
        """Adds rows (n, D) to the gradient of the table at their tokens (n,)."""
        found = self.sums.get(id(self.table))
        if found is not None:
            found.whole().index_add_(0, tokens, rows.to(found.dtype))


class _ChunkContext(EBTContext):
    """The part of a pupil's context that a chunk attends to, as leaves of graphs of its own."""

    def __init__(self, pupil: _Pupil, rows: slice, positions: slice) -> None:
        whole = pupil.context
        mask = whole.mask[rows if len(whole.mask) > 1 else slice(None), :, positions]
        places = whole.position_ids[rows if len(whole.position_ids) > 1 else slice(None), positions]
        # the columns at the end that nobody here sees are left out
        seen = mask.flatten(0, 2).any(0).nonzero()
        self.columns = int(seen[-1]) + 1 if len(seen) else 0
        super().__init__(whole.keys, whole.values, mask[..., : self.columns], places)
        self.pupil, self.rows = pupil, rows
        self.leaves: list[Leaf] = []
        self.landscapes: dict[int, list[tuple[Tensor, Tensor]]] = {}
        if whole.anchors is not None:
            self.anchors = self._leaf(whole.anchors, (rows, positions))

    def on_landscape(self, landscape: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every layer."""
        if landscape not in self.landscapes:
            index = (self.rows, landscape, slice(None), slice(self.columns))
            pairs = zip(self.keys, self.values, strict=True)
            self.landscapes[landscape] = [(self._leaf(key, index), self._leaf(value, index)) for key, value in pairs]
        return self.landscapes[landscape]

    def _leaf(self, tensor: Tensor, index: tuple) -> Tensor:
        leaf = tensor[index].detach()
        found = self.pupil.sums.get(id(tensor))
        if found is not None:
            self.leaves.append((leaf.requires_grad_(), lambda gradient: found.whole()[index].add_(gradient)))
        return leaf


@dataclass
class _Step:
    """
    What is remembered of a step until its loss is known.

    Args:
        embedded (`Tensor` of shape `(r, s, D)`): the candidates [c = p W], a leaf.
        landscape (`int`): that it went on.
        size (`Tensor` or `float`): [alpha].
        move (`Tensor` of shape `(r, s, D)`): [m = alpha dE/dc].
    """

    embedded: Tensor
    landscape: int
    size: Tensor | float
    move: Tensor


class _Lesson(TextCandidates):
    """
    The candidates of a chunk: a space of the descent that differentiates every step as soon as its logits are there.

    Args:
        pupil ([`_Pupil`]): gathers the gradients.
        context ([`_ChunkContext`]): what they attend to.
        targets (`torch.LongTensor` of shape `(n,)`): their right tokens, -100 for none.
        weights (list of `Tensor` or `None`): of every step's loss in the objective; None where it does not count.
        room (`Tensor` of shape `(n, V)`): for their logits.
        share (`Tensor` of shape `(n, V)`): for their distributions.
        scratch (`Tensor` of shape `(up to n, V)`): for distributions that are needed for a moment.
    """

    def __init__(
        self,
        pupil: _Pupil,
        context: _ChunkContext,
        targets: Tensor,
        weights: list[Tensor | None],
        room: Tensor,
        share: Tensor,
        scratch: Tensor,
    ) -> None:
        super().__init__(pupil.table, pupil.update_rule)
        self.pupil, self.context, self.weights = pupil, context, weights
        self.room, self.share, self.scratch = room, share, scratch
        self.labelled, self.targets = targets != -100, targets.clamp(min=0)
        self.losses: list[Tensor] = []  # summed over the candidates, after every step
        self.landscape = 0
        self.embedded: Tensor | None = None
        self.step: _Step | None = None
        self.owed: Tensor | None = None  # what the last loss still has to take from the table along `p'`

    def energy(self, embedded: Tensor, landscape: int) -> Tensor:
        """Energies (r, s) of embedded candidates (r, s, D)."""
        self.landscape = landscape
        return self.pupil.energy(embedded, self.context, landscape)

    def point(self, state: Tensor) -> Tensor:
        """The logits (r, s, V) themselves; their softmax is taken where there is room for it."""
        return state

    @torch.no_grad()
    def embed(self, point: Tensor) -> Tensor:
        """Logits (r, s, V) -> embedded candidates (r, s, D), a leaf; and the step before is differentiated."""
        # with noise between them, the loss of that step is one of other logits than these
        goes_on = self.step is not None and not self.pupil.schedule[len(self.losses) + 1].noise_std > 0
        embedded = None if self.step is None else self.learn(goes_on)
        torch.softmax(point.reshape(self.room.shape), dim=-1, out=self.share)
        if embedded is None or not goes_on:
            embedded = self.pupil.embed(self.share)
        self.embedded = embedded.view(*point.shape[:-1], -1).detach().requires_grad_()
        return self.embedded

    def update(self, state: Tensor, point: Tensor, gradient: Tensor, step_size: Tensor | float) -> Tensor:
        """One step along `gradient` (r, s, D); returns logits (r, s, V), a constant in the `room`."""
        assert self.embedded is not None  # the energy was asked for
        move = step_size * gradient.to(self.room.dtype)
        self.step = _Step(self.embedded, self.landscape, step_size, move)
        base = self.share if self.update_rule == "replace" else state.reshape(self.room.shape)
        with torch.no_grad():
            self.pupil.project(base, move.detach().flatten(0, -2), self.room)
        return self.room.view(state.shape)

    @torch.no_grad()
    def learn(self, goes_on: bool) -> Tensor | None:
        """
        Takes the loss of the logits after a step, and adds its gradients.

        Args:
            goes_on (`bool`): whether the next step starts from these logits, and so does the rest of the table's part.

        Returns:
            What the logits embed to (n, D); None where the step does not count and nothing needed it.
        """
        assert self.step is not None  # a step has been made
        step, self.step, weight = self.step, None, self.weights[len(self.losses)]
        owed, self.owed = self.owed, None
        counted = None if weight is None else self.labelled[:, None] * weight
        if counted is not None:
            self.owed = counted * step.move.detach().flatten(0, -2)
        parts, total = [], self.room.new_zeros(())
        for start in range(0, len(self.room), len(self.scratch)):
            rows = slice(start, start + len(self.scratch))
            logits = self.room[rows]
            share = torch.softmax(logits, dim=-1, out=self.scratch[: len(logits)])
            # of the likeliest token both are known well: the difference is what all logits are normalised by
            normalizer = logits.amax(-1) - share.amax(-1).log()
            losses = normalizer - logits.gather(1, self.targets[rows, None])[:, 0]
            total += torch.where(self.labelled[rows], losses, 0).sum()
            if counted is not None or goes_on:
                parts.append(self.pupil.embed(share))
            if self.owed is not None and not goes_on:
                self.pupil.table_learns(share, -self.owed[rows])
        self.losses.append(total)
        embedded = torch.cat(parts) if parts else None
        if counted is not None and embedded is not None and self.owed is not None:
            # dL/dm = -(p' W - W[t])
            pull = counted * (self.table.detach()[self.targets] - embedded).to(counted.dtype)
            gradient = self._differentiate(step, pull.view(step.move.shape)).flatten(0, -2)
            self.pupil.table_learns(self.share, gradient if owed is None else gradient - owed)
            self.pupil.table_learns_at(self.targets, self.owed)
        if not goes_on:
            self.owed = None  # paid above
        return embedded

    def _differentiate(self, step: _Step, pull: Tensor) -> Tensor:
        """Adds the gradients of `sum(pull * move)`; returns that of the embedded candidates (r, s, D)."""
        leaves = [*self.pupil.leaves, *self.context.leaves]
        by_embedded, *gradients = differentiate(
            lambda point: self.energy(point, step.landscape),
            step.embedded,
            step.move,
            step.size,
            pull,
            [leaf for leaf, _ in leaves],
            self.pupil.second_order,
        )
        for (_, take), gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:
                take(gradient)
        return torch.zeros_like(pull) if by_embedded is None else by_embedded.to(pull.dtype)


class _Known(torch.autograd.Function):
    """An objective whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, objective: Tensor, logits: Tensor, gradients: list[Tensor | None], *inputs: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*gradients)
        return objective.clone(), logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, by_logits: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "The loss of a training step that takes its candidates in chunks can be differentiated only once. Set "
                "`model.config.training_chunk_size = 0` for `create_graph=True`."
            )
        if by_logits is not None:
            raise RuntimeError(
                "The logits of a training step carry no gradient when it takes its candidates in chunks, and "
                "something is differentiated through them. Use `output.loss` alone, call the model without `labels`, "
                "or set `model.config.training_chunk_size = 0`."
            )
        known = ctx.saved_tensors
        return None, None, None, *(None if grad is None or each is None else each * grad for each in known)


@dataclass
class Learned:
    """
    A descent with its loss and, behind that, its gradients.

    Args:
        objective (`Tensor`): scalar, differentiable once.
        losses (`Tensor` of shape `(K,)`): cross-entropy after every step, divided by the number of items.
        result ([`DescentOutput`]): logits (B, T, V) and energies (B, T) of every step, constants.
    """

    objective: Tensor
    losses: Tensor
    result: DescentOutput


def learn(
    energy: EnergyOfContext,
    parameters: Sequence[Tensor],
    space: TextCandidates,
    context: EBTContext,
    start: Callable[[slice, slice, Tensor], Tensor],
    schedule: Sequence[DescentStep],
    targets: Tensor,
    items: Tensor | float,
    *,
    loss_on_steps: str = "all",
    second_order: str = "double_backward",
    chunk_size: int = 512,
    generator: torch.Generator | None = None,
) -> Learned:
    """
    Descends all candidates and differentiates the cross-entropy after every step.

    Args:
        energy (`Callable`): `(embedded candidates (r, s, D), context, landscape) -> energies (r, s)`.
        parameters (sequence of `Tensor`): what the energy is made of.
        space ([`TextCandidates`]): the table [W] (V, D) and the rule of the update.
        context ([`EBTContext`]): of all candidates, one at each position.
        start (`Callable`): `(rows, positions, room) -> logits (r, s, V)` to start from, constants; they may be in the
            room.
        schedule (sequence of [`DescentStep`]): the steps; step sizes are (1,) or (B, T, 1).
        targets (`torch.LongTensor` of shape `(B, T)`): the right tokens, -100 for none.
        items (`Tensor` or `float`): what sums of cross-entropies are divided by.
        loss_on_steps (`str`): `"all"` or `"last"`, see [`EBTConfig`].
        second_order (`str`): how a step is differentiated, see [`EBTConfig`].
        chunk_size (`int`): candidates at a time.
        generator (`torch.Generator`, *optional*): source of the noise.

    Returns:
        [`Learned`].
    """
    pupil = _Pupil(energy, parameters, space, context, schedule, second_order)
    batch, positions, vocab, last = *targets.shape, len(space.table), len(schedule) - 1
    dtype = torch.promote_types(space.table.dtype, torch.float32)
    targets = targets.to(space.table.device)
    every = loss_on_steps == "all"
    weight = torch.ones((), dtype=dtype, device=targets.device) / (items * (len(schedule) if every else 1))
    weights = [weight if every or index == last else None for index in range(len(schedule))]
    logits = torch.empty(batch, positions, vocab, dtype=dtype, device=targets.device)
    blocks = list(chunks(batch, positions, chunk_size))
    widest = max(logits[rows, part, 0].numel() for rows, part in blocks)
    share_room, scratch = (
        torch.empty(n, vocab, dtype=dtype, device=targets.device) for n in (widest, (widest + 1) // 2)
    )
    energies = torch.empty(len(schedule), batch, positions, device=targets.device)
    losses = torch.zeros(len(schedule), dtype=dtype, device=targets.device)
    for rows, part in blocks:
        own = targets[rows, part].flatten()
        place = logits[rows, part].view(len(own), vocab)
        attended = _ChunkContext(pupil, rows, part)
        lesson = _Lesson(pupil, attended, own, weights, place, share_room[: len(own)], scratch)
        walked = descend(
            lesson.energy,
            lesson,
            start(rows, part, place),
            [_part_of(step, rows, part) for step in pupil.schedule],
            graph_on_steps=loss_on_steps if second_order == "double_backward" else "none",
            generator=generator,
        )
        lesson.learn(goes_on=False)
        losses += torch.stack(lesson.losses)
        energies[:, rows, part] = torch.stack([each.detach() for each in walked.energies])
    losses = losses / items
    objective = losses.mean() if every else losses[-1]
    objective, logits = _Known.apply(objective, logits, pupil.gradients(), *pupil.inputs())
    taken = torch.full((batch, positions), len(schedule), device=targets.device)
    return Learned(objective, losses, DescentOutput(logits, list(energies), taken, taken))


def _part_of(step: DescentStep, rows: slice, positions: slice) -> DescentStep:
    """A step with the step sizes of a chunk, where every candidate has its own."""
    size = step.step_size
    if not isinstance(size, Tensor) or size.dim() < 3:
        return step
    return replace(step, step_size=size[rows, positions])


__all__ = ["Learned", "chunks", "learn"]
