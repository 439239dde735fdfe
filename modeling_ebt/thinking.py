"""From thinking options to a schedule of descent steps, and from several descended candidates to one."""

from typing import Any

import torch
from torch import Tensor

from .configuration_ebt import EBTConfig
from .descent import DescentOutput, DescentStep
from .thinking_ebt import ThinkingConfig


def resolve_thinking(
    config: EBTConfig, thinking: ThinkingConfig | dict[str, Any] | None, flat: dict[str, Any], training: bool
) -> ThinkingConfig:
    """
    This call's options over the config's defaults. In training there is one candidate, and torch's own randomness.

    Raises:
        ValueError: for unknown options, values out of range, and evaluation-only options in training.
    """
    called = ThinkingConfig.from_value({name: value for name, value in flat.items() if value is not None})
    called = called.merged_over(ThinkingConfig.from_value(thinking))
    defaults = ThinkingConfig.from_value(config.default_thinking())
    if training:
        if (called.candidates or 1) > 1 or called.tolerance is not None or called.accept_only_lower_energy:
            raise ValueError(
                "Several candidates, a tolerance and `accept_only_lower_energy` are for evaluation: call "
                "`model.eval()` first."
            )
        init = "normal" if config.candidate_init == "normal" else "mean"
        trained = ThinkingConfig(candidates=1, accept_only_lower_energy=False, init=init, seed=-1)
        inherited = ThinkingConfig(
            steps=defaults.steps,
            selection=defaults.selection,
            step_size_scale=defaults.step_size_scale,
            noise_std=defaults.noise_std,
            noise_first_step_only=defaults.noise_first_step_only,
        )
        defaults = trained.merged_over(inherited)
    return called.merged_over(defaults)


def make_schedule(config: EBTConfig, thinking: ThinkingConfig, step_size: Tensor) -> list[DescentStep]:
    """
    One [`DescentStep`] for every thinking step.

    Args:
        config ([`EBTConfig`]): gives the number of landscapes.
        thinking ([`ThinkingConfig`]): fully resolved options.
        step_size (`Tensor` of shape `(1,)`): the model's own step size [alpha].

    Raises:
        ValueError: for a landscape the model does not have, or a list of scales of the wrong length.
    """
    last = config.num_landscapes - 1
    landscapes = thinking.landscapes or [min(index, last) for index in range(thinking.steps)]
    if max(landscapes) > last:
        raise ValueError(f"`thinking_landscapes` must be between 0 and {last} for this model, got {landscapes}.")
    scale = thinking.step_size_scale
    scales = list(scale) if isinstance(scale, (list, tuple)) else [scale] * len(landscapes)
    if len(scales) != len(landscapes):
        raise ValueError(
            f"`thinking_step_size_scale` must be a number, or one number for each of the {len(landscapes)} steps, got "
            f"{len(scales)} numbers."
        )
    size = step_size if thinking.step_size is None else float(thinking.step_size)
    noises = [thinking.noise_std] * len(landscapes)
    if thinking.noise_first_step_only:
        noises[1:] = [0.0] * (len(landscapes) - 1)
    return [
        DescentStep(landscape, size if factor == 1 else size * factor, noise)
        for landscape, factor, noise in zip(landscapes, scales, noises, strict=True)
    ]


def select_candidate(result: DescentOutput, selection: str, candidates: int) -> tuple[Tensor, Tensor, Tensor]:
    """
    The chosen candidate of every position (self-verification, Alg. 2).

    Args:
        result ([`DescentOutput`]): of candidates (B, M T), candidate-major.
        selection (`str`): `"min_energy"`, `"max_gap"` or `"max_energy"`.
        candidates (`int`): M.

    Returns:
        Logits (B, T, V), energies (B, T, K or K + 1) and steps taken (B, T).
    """
    energies = torch.stack(result.energies, dim=-1)
    if candidates == 1:
        return result.state, energies, result.steps_taken
    energies = energies.unflatten(1, (candidates, -1))
    if selection == "min_energy":
        chosen = energies[..., -1].argmin(1)
    elif selection == "max_energy":
        chosen = energies[..., -1].argmax(1)
    else:
        chosen = (energies[..., 0] - energies[..., -1]).argmax(1)

    def pick(tensor: Tensor) -> Tensor:
        index = chosen.reshape(chosen.shape[0], 1, chosen.shape[1], *(1,) * (tensor.dim() - 3))
        return tensor.gather(1, index.expand(-1, -1, -1, *tensor.shape[3:])).squeeze(1)

    return (
        pick(result.state.unflatten(1, (candidates, -1))),
        pick(energies),
        pick(result.steps_taken.unflatten(1, (candidates, -1))),
    )


def random_generator(thinking: ThinkingConfig, device: torch.device, offset: int = 0) -> torch.Generator | None:
    """A generator for this call, `None` (torch's global one) for seed -1; `offset` tells a text's tokens apart."""
    if thinking.seed == -1:
        return None
    return torch.Generator(device).manual_seed(thinking.seed * 1_000_003 + offset)


__all__ = ["make_schedule", "random_generator", "resolve_thinking", "select_candidate"]
