"""From thinking options to how the blocks of an Energy Transformer are descended."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .configuration_energy_transformer import EnergyTransformerConfig
from .descent import DescentStep, StopRules, standard_normal
from .energies import EnergyTransformerBlock, Pattern
from .thinking_ebt import ThinkingConfig


JUDGING = ("accept_only_lower_energy", "tolerance", "target_energy")
OPTIONS = ("steps", "step_size", "step_size_scale", "noise_std", "seed", *JUDGING)


@dataclass(frozen=True)
class Thinking:
    """
    What one call does, in every block.

    Args:
        step_sizes (`list[float]`): of every step.
        noise_std (`float`): every step adds noise of this times the root of its size.
        accept_only_lower_energy (`bool`), stop ([`StopRules`]): as in [`ThinkingConfig`].
        seed (`int`): of the noise; -1 for torch's own.
    """

    step_sizes: list[float]
    noise_std: float
    accept_only_lower_energy: bool
    stop: StopRules
    seed: int

    @property
    def schedule(self) -> list[DescentStep]:
        """For [`descend`]; the noise is the space's."""
        return [DescentStep(landscape=0, step_size=size) for size in self.step_sizes]

    @property
    def judges(self) -> bool:
        """Whether what happens depends on the energy."""
        return self.accept_only_lower_energy or self.stop.given

    def generator(self, device: torch.device) -> torch.Generator | None:
        """Source of the noise, None for torch's own."""
        return None if self.seed < 0 else torch.Generator(device).manual_seed(self.seed)


def resolve_thinking(
    config: EnergyTransformerConfig,
    thinking: ThinkingConfig | dict[str, Any] | None,
    flat: dict[str, Any],
    training: bool,
) -> Thinking:
    """
    This call's options over the config's defaults.

    Args:
        config ([`EnergyTransformerConfig`]): gives the defaults.
        thinking ([`ThinkingConfig`] or `dict`, *optional*): options of the call.
        flat (`dict`): options of the call under their flat names; they win.
        training (`bool`): whether the model is in training mode.

    Raises:
        ValueError: for unknown options, values out of range, options without a meaning for the model, options of
            evaluation in training, and a list of scales of the wrong length.
    """
    called = ThinkingConfig.from_call(thinking, flat)
    given = [field.name for field in fields(called) if getattr(called, field.name) is not None]
    foreign = [f"thinking_{name}" for name in given if name not in OPTIONS]
    if foreign:
        raise ValueError(
            f"{', '.join(foreign)} means nothing to an Energy Transformer, whose tokens descend from where they are. "
            f"Allowed: {', '.join(f'thinking_{name}' for name in OPTIONS)}."
        )
    judging = [name for name in JUDGING if name in given]
    if training and judging:
        raise ValueError(f"thinking_{judging[0]} is for evaluation: call `model.eval()` first.")
    steps = config.thinking_steps if called.steps is None else called.steps
    if steps < 1:
        raise ValueError(f"`thinking_steps` must be at least 1 for an Energy Transformer, got {steps}.")
    scale = called.step_size_scale
    scales = list(scale) if isinstance(scale, (list, tuple)) else [1.0 if scale is None else scale] * steps
    if len(scales) != steps:
        raise ValueError(
            f"`thinking_step_size_scale` must be a number, or one number for each of the {steps} steps, got "
            f"{len(scales)} numbers."
        )
    step_size = float(config.step_size if called.step_size is None else called.step_size)
    noise = (config.noise_std if training else 0.0) if called.noise_std is None else called.noise_std
    seed = (-1 if training else 0) if called.seed is None else called.seed
    return Thinking(
        step_sizes=[step_size * factor for factor in scales],
        noise_std=float(noise),
        accept_only_lower_energy=bool(called.accept_only_lower_energy),
        stop=StopRules(tolerance=called.tolerance, target_energy=called.target_energy),
        seed=seed,
    )


class TokenSpace:
    """
    How tokens move ([`CandidateSpace`] of the descent): the energy sees them normalised, and its gradient there moves
    the tokens themselves (eq. 6), with noise (eq. 27).

    Args:
        norm (`Callable`): the block's layer norm.
        noise_std (`float`): of the noise, before it is multiplied by the root of the step size.
        generator (`torch.Generator`, *optional*): of the noise.
    """

    def __init__(self, norm: Callable[[Tensor], Tensor], noise_std: float, generator: torch.Generator | None) -> None:
        self.norm, self.noise_std, self.generator = norm, noise_std, generator

    def point(self, state: Tensor) -> Tensor:
        """The tokens themselves."""
        return state

    def embed(self, point: Tensor) -> Tensor:
        """The normalised tokens."""
        return self.norm(point)

    def update(self, state: Tensor, point: Tensor, gradient: Tensor, step_size: Tensor | float) -> Tensor:
        """One step down."""
        moved = state - step_size * gradient.to(state.dtype)
        if self.noise_std == 0:
            return moved
        noise = standard_normal(state.shape, self.generator, state.device, state.dtype)
        return moved + self.noise_std * float(step_size) ** 0.5 * noise


@dataclass(frozen=True)
class BlockEnergy:
    """
    A block's energy as the descent asks for it: tokens `(B, 1, N, D)`, of which each of the `B` is a row, or the
    tokens of all graphs `(1, 1, N, D)`.

    Args:
        block ([`EnergyTransformerBlock`]): the energy.
        patterns (sequence of [`DensePattern`] or [`EdgePattern`]): for each relation who attends to whom.
        graph_index (`torch.LongTensor` of shape `(N,)`, *optional*): the graph each token belongs to.
        num_graphs (`int`): how many there are.
    """

    block: EnergyTransformerBlock
    patterns: Sequence[Pattern]
    graph_index: Tensor | None = None
    num_graphs: int = 1

    def __call__(self, normed: Tensor, landscape: int) -> Tensor:
        """Energies: `(B, 1)`, or of every graph `(1, G)`."""
        return self._sums(self.block(self._tokens(normed), self.patterns, with_gradient=False)[0])

    def with_gradient(self, normed: Tensor, landscape: int) -> tuple[Tensor, Tensor]:
        """Energies, and the gradient of their sum, shaped as the tokens."""
        energy, gradient = self.block(self._tokens(normed), self.patterns)
        return self._sums(energy), gradient.view(normed.shape)

    def _tokens(self, normed: Tensor) -> Tensor:
        return normed[:, 0] if self.graph_index is None else normed[0, 0]

    def _sums(self, energy: Tensor) -> Tensor:
        if self.graph_index is None:
            return energy.sum(-1, keepdim=True)
        return energy.new_zeros(self.num_graphs).index_add(0, self.graph_index, energy)[None]


__all__ = ["BlockEnergy", "Thinking", "TokenSpace", "resolve_thinking"]
