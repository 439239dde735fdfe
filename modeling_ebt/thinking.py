"""From thinking options to a schedule of descent steps, and from several descended candidates to one."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .base_ebt import EBTBaseConfig
from .candidates import kl_divergence
from .descent import DescentOutput, DescentStep, StopRules, standard_normal
from .thinking_ebt import ThinkingConfig


@dataclass(frozen=True)
class Thinking:
    """
    A [`ThinkingConfig`] with everything decided: what one call does.

    Args:
        landscapes (`list[int]`): of every step.
        scales (`list[float]`): factor on the step size of every step.
        noises (`list[float]`): noise before every step.
        step_size (`float`, *optional*): instead of the model's own.
        candidates, selection, accept_only_lower_energy, tolerance, kl_tolerance, target_energy, budget, prune_keep,
            prune_after, init, seed: as in [`ThinkingConfig`].
    """

    landscapes: list[int]
    scales: list[float]
    noises: list[float]
    step_size: float | None
    candidates: int
    selection: str
    accept_only_lower_energy: bool
    tolerance: float | None
    kl_tolerance: float | None
    target_energy: float | None
    budget: int | None
    prune_keep: int | None
    prune_after: int
    init: str
    seed: int


def resolve_thinking(
    config: EBTBaseConfig, thinking: ThinkingConfig | dict[str, Any] | None, flat: dict[str, Any], training: bool
) -> Thinking:
    """
    This call's options over the config's defaults. In training there is one candidate, and torch's own randomness.

    Args:
        config ([`EBTBaseConfig`]): gives the defaults and the number of landscapes.
        thinking ([`ThinkingConfig`] or `dict`, *optional*): options of the call.
        flat (`dict`): options of the call under their flat names; they win.
        training (`bool`): whether the model is in training mode.

    Raises:
        ValueError: for unknown options, values out of range, options without a meaning for the model, evaluation-only
            options in training, a landscape the model does not have, and a list of scales of the wrong length.
    """
    called = ThinkingConfig.from_call(thinking, flat)
    defaults = ThinkingConfig.from_value(config.default_thinking())
    for name, reason in config.thinking_without_meaning.items():
        if getattr(called, name):
            raise ValueError(f"`thinking_{name}` means nothing for this model: {reason}")
    if training:
        stops = called.tolerance is not None or called.target_energy is not None
        adaptive = called.kl_tolerance or called.budget or called.prune_keep
        if (called.candidates or 1) > 1 or stops or adaptive or called.accept_only_lower_energy:
            raise ValueError(
                "Several candidates, stop rules, budgets and `accept_only_lower_energy` are for evaluation: call "
                "`model.eval()` first."
            )
        defaults = ThinkingConfig(
            steps=_training_steps(config, defaults.steps),
            noise_std=config.thinking_noise_std,
            init="normal" if config.starts_at_random else "mean",
            seed=-1,
        )
    wanted = called.merged_over(defaults)

    last = config.num_landscapes - 1
    landscapes = wanted.landscapes
    if landscapes is None:
        count = config.num_landscapes if wanted.steps is None else wanted.steps
        landscapes = [min(index, last) for index in range(count)]
    if not landscapes and not config.starts_at_prediction:
        raise ValueError(
            "`thinking_steps` must be at least 1 for this model, got 0: it starts from nothing, and without a step it "
            "predicts nothing. Only a model with `candidate_init='proposal'` does."
        )
    if max(landscapes, default=0) > last:
        raise ValueError(f"`thinking_landscapes` must be between 0 and {last} for this model, got {landscapes}.")
    steps = len(landscapes)
    scale = wanted.step_size_scale
    scales = list(scale) if isinstance(scale, (list, tuple)) else [1.0 if scale is None else scale] * steps
    if len(scales) != steps:
        raise ValueError(
            f"`thinking_step_size_scale` must be a number, or one number for each of the {steps} steps, got "
            f"{len(scales)} numbers."
        )
    _check_pruning(called, wanted, steps)
    noise = float(wanted.noise_std or 0.0)
    return Thinking(
        landscapes=list(landscapes),
        scales=scales,
        noises=([noise] + [0.0 if wanted.noise_first_step_only else noise] * (steps - 1))[:steps],
        step_size=None if wanted.step_size is None else float(wanted.step_size),
        candidates=wanted.candidates or 1,
        selection=wanted.selection or "min_energy",
        accept_only_lower_energy=bool(wanted.accept_only_lower_energy),
        tolerance=wanted.tolerance,
        kl_tolerance=wanted.kl_tolerance or None,
        target_energy=wanted.target_energy,
        budget=wanted.budget or None,
        prune_keep=wanted.prune_keep,
        prune_after=wanted.prune_after or 1,
        init=wanted.init or "mean",
        seed=0 if wanted.seed is None else wanted.seed,
    )


def _check_pruning(called: ThinkingConfig, wanted: ThinkingConfig, steps: int) -> None:
    """Raises where a call asks for pruning that cannot happen."""
    if called.prune_after is not None and wanted.prune_keep is None:
        raise ValueError(
            f"`thinking_prune_after` ({called.prune_after}) means nothing without `thinking_prune_keep`: how many "
            "candidates go on?"
        )
    after = wanted.prune_after or 1
    if wanted.prune_keep is not None and wanted.prune_keep < (wanted.candidates or 1) and after >= steps:
        raise ValueError(
            f"`thinking_prune_after` must be below the number of steps ({steps}), got {after}: nothing would be "
            "pruned. Take more `thinking_steps`, or leave out `thinking_prune_keep`."
        )


def _training_steps(config: EBTBaseConfig, default: int | None) -> int | None:
    """The number of steps of one batch in training."""
    if config.random_steps is None:
        return default
    fewest, most = config.random_steps
    return int(torch.randint(fewest, most + 1, (1,)))


def random_step_sizes(config: EBTBaseConfig, step_size: Tensor, shape: tuple[int, ...]) -> Tensor:
    """
    The step size of every candidate in training: uniform between [alpha] / s and [alpha] s, s = `random_step_size`.

    Args:
        config ([`EBTBaseConfig`]): gives s.
        step_size (`Tensor` of shape `(1,)`): the model's own step size [alpha].
        shape (`tuple[int]`): that of the draws; broadcasts against the gradient.
    """
    spread = float(config.random_step_size)
    if spread == 1:
        return step_size
    return step_size * (1 / spread + torch.rand(shape, device=step_size.device) * (spread - 1 / spread))


def training_start(
    random: bool, std: float, shape: tuple[int, ...], device: torch.device, out: Tensor | None = None
) -> Tensor:
    """
    Where the descent starts in training, in float32; every row and position starts at a place of its own.

    Args:
        random (`bool`): Gaussian starts from torch's global generator; zeros otherwise.
        std (`float`): their standard deviation (`candidate_init_std`).
        shape (`tuple[int, ...]`): of the start.
        device (`torch.device`): where to.
        out (`Tensor`, *optional*): contiguous, to put it in.
    """
    if random:
        drawn = standard_normal(shape, None, device, torch.float32, out)
        return drawn if std == 1 else drawn.mul_(std)
    return torch.zeros(shape, device=device) if out is None else out.zero_().view(shape)


def given_start(given: Tensor, shape: tuple[int, ...], axes: str, training: bool) -> Tensor:
    """
    An `initial_candidate` with its dimension of candidates, in float32.

    Args:
        given (`Tensor`): of `shape`, or without candidates; in evaluation it may bring several where one was asked
            for.
        shape (`tuple[int, ...]`): `(B, M, ...)`.
        axes (`str`): the names of its dimensions.
        training (`bool`): whether the model is in training mode.

    Raises:
        ValueError: for another shape.
    """
    state = given[:, None] if given.dim() == len(shape) - 1 else given
    if state.dim() == len(shape) and state.shape[1] > 1 and shape[1] == 1 and not training:
        shape = (shape[0], state.shape[1], *shape[2:])
    if state.shape != shape:
        raise ValueError(
            f"`initial_candidate` must have shape {shape} ({axes}) or leave out the candidates, got "
            f"{tuple(given.shape)}."
        )
    return state.float()


def random_offsets(thinking: Thinking, shape: tuple[int, ...], spread: float, device: torch.device) -> Tensor:
    """
    How far from the mean start every candidate starts in evaluation; shared by all rows and positions, so that a row's
    result does not depend on its batch.

    Args:
        thinking ([`Thinking`]): with `init="mean"` the first candidate stays at the mean.
        shape (`tuple[int, ...]`): `(M, ...)`.
        spread (`float`): standard deviation.
        device (`torch.device`): where to.
    """
    offsets = torch.zeros(shape, device=device)
    first = 1 if thinking.init == "mean" else 0
    if spread > 0 and shape[0] > first:
        generator = random_generator(thinking, device)
        drawn = standard_normal((shape[0] - first, *shape[1:]), generator, device, torch.float32)
        offsets[first:] = spread * drawn
    return offsets


def make_schedule(thinking: Thinking, step_size: Tensor) -> list[DescentStep]:
    """
    One [`DescentStep`] for every thinking step.

    Args:
        thinking ([`Thinking`]): what the call does.
        step_size (`Tensor`): the model's own step size [alpha], (1,) or one for each candidate.
    """
    size = step_size if thinking.step_size is None else thinking.step_size
    return [
        DescentStep(landscape, size if factor == 1 else size * factor, noise)
        for landscape, factor, noise in zip(thinking.landscapes, thinking.scales, thinking.noises, strict=True)
    ]


def stop_rules(thinking: Thinking, candidates: int, step_limits: Tensor | None = None) -> StopRules:
    """
    When the candidates (B, M T) of a call stop.

    Args:
        thinking ([`Thinking`]): what the call does.
        candidates (`int`): M.
        step_limits (`torch.LongTensor` of shape `(B, M T)`, *optional*): the most steps each may take.

    Raises:
        ValueError: if more candidates are to be kept than there are.
    """
    keep = candidates if thinking.prune_keep is None else thinking.prune_keep
    close = thinking.kl_tolerance
    if keep > candidates:
        raise ValueError(
            f"`thinking_prune_keep` must be at most the number of candidates ({candidates}), got {keep}. Give "
            "`thinking_candidates` of them, too."
        )
    prunes = keep < candidates
    return StopRules(
        tolerance=thinking.tolerance,
        target_energy=thinking.target_energy,
        stable=None if close is None else lambda new, old: kl_divergence(new, old) <= close,
        step_limits=step_limits,
        prune_after=thinking.prune_after if prunes else None,
        prune=partial(_best, keep=keep, selection=thinking.selection, candidates=candidates) if prunes else None,
    )


def _badness(first: Tensor, last: Tensor, selection: str) -> Tensor:
    """What a selection makes of energies at the start and at the end: the candidate of the lowest is the best."""
    if selection == "min_energy":
        return last
    return -last if selection == "max_energy" else last - first


def _best(first: Tensor, last: Tensor, keep: int, selection: str, candidates: int) -> Tensor:
    """True for the `keep` best of every position, by energies (B, M T)."""
    badness = _badness(first, last, selection).unflatten(1, (candidates, -1))
    best = badness.topk(keep, dim=1, largest=False).indices
    return torch.zeros_like(badness, dtype=torch.bool).scatter_(1, best, True).flatten(1)


def choose_candidate(result: DescentOutput, selection: str, candidates: int) -> Tensor | None:
    """
    Which candidate of every position to keep (self-verification, Alg. 2).

    Args:
        result ([`DescentOutput`]): of candidates (B, M T), candidate-major, with the energy after the last step.
        selection (`str`): `"min_energy"`, `"max_gap"` or `"max_energy"`.
        candidates (`int`): M.

    Returns:
        `torch.LongTensor` of shape `(B, M, T)` with the same index along M for [`pick_candidate`]; `None` for M = 1.
    """
    if candidates == 1:
        return None
    first, last = (energies.unflatten(1, (candidates, -1)) for energies in (result.energies[0], result.energies[-1]))
    badness = _badness(first, last, selection)
    if result.kept is not None:
        badness = badness.masked_fill(~result.kept.unflatten(1, (candidates, -1)), float("inf"))
    return badness.argmin(1, keepdim=True).expand(-1, candidates, -1)


def pick_candidate(tensor: Tensor, chosen: Tensor | None) -> Tensor:
    """Of a tensor (B, M T, ...) what belongs to the candidates chosen by [`choose_candidate`], (B, T, ...)."""
    if chosen is None:
        return tensor
    tensor = tensor.unflatten(1, chosen.shape[1:])
    index = chosen[:, :1].reshape(chosen.shape[0], 1, chosen.shape[2], *(1,) * (tensor.dim() - 3))
    return tensor.gather(1, index.expand(-1, -1, -1, *tensor.shape[3:])).squeeze(1)


def random_generator(thinking: Thinking, device: torch.device, offset: int = 0) -> torch.Generator | None:
    """A generator for this call, `None` (torch's global one) for seed -1; `offset` tells a text's tokens apart."""
    if thinking.seed == -1:
        return None
    return torch.Generator(device).manual_seed(thinking.seed * 1_000_003 + offset)


__all__ = [
    "Thinking",
    "choose_candidate",
    "given_start",
    "make_schedule",
    "pick_candidate",
    "random_generator",
    "random_offsets",
    "random_step_sizes",
    "resolve_thinking",
    "stop_rules",
    "training_start",
]
