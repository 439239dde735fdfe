"""
What the transformers for text and for images share: step size, modulation by the step, energy head.

A file of its own, so that an image checkpoint carries nothing of the text model. ``B`` rows, ``D`` width.
"""

import torch
from torch import Tensor, nn

from .base_ebt import EBTBaseConfig


MIN_STEP_SIZE = 1e-4  # the official code clamps the learned step size here


def modulate(hidden: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift of a normed activation, as in DiT."""
    return hidden * (1 + scale) + shift


class EBTStepSize(nn.Module):
    """The step size [alpha]; a module of its own so that adapters and optimizers can address it."""

    def __init__(self, config: EBTBaseConfig) -> None:
        super().__init__()
        # shape (1,), because sharded training takes no scalar parameters
        self.value = nn.Parameter(torch.full((1,), float(config.step_size)), requires_grad=config.learn_step_size)

    def forward(self) -> Tensor:
        """The step size (1,), at least 1e-4, in float32."""
        return self.value.float().clamp(min=MIN_STEP_SIZE)


class EBTModulation(nn.Linear):
    """
    What the step does to normed activations (adaLN): shifts, scales and gates computed from its embedding, see
    [`modulation_parts`].

    A class of its own, because transformers initialises custom models by the modules that own parameters; a plain
    linear map, because adapters wrap those.

    Args:
        width (`int`): D.
        parts (`int`): vectors it gives.
    """

    def __init__(self, width: int, parts: int) -> None:
        super().__init__(width, parts * width)


def modulation_parts(layer: nn.Module, condition: Tensor) -> tuple[Tensor, ...]:
    """Step embedding (B or 1, D) -> the vectors an [`EBTModulation`] makes of it, each (B or 1, 1, D)."""
    return layer(nn.functional.silu(condition)).unsqueeze(1).split(condition.shape[-1], dim=-1)


class EBTEnergyHead(nn.Linear):
    """Hidden states to energies. No bias: only energy differences matter, and a bias would never get a gradient."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 1, bias=False)


def head_energies(head: nn.Module, hidden: Tensor) -> Tensor:
    """Hidden (..., D) -> energies (...) of an [`EBTEnergyHead`], in float32."""
    return head(hidden).squeeze(-1).float()


__all__ = [
    "MIN_STEP_SIZE",
    "EBTEnergyHead",
    "EBTModulation",
    "EBTStepSize",
    "head_energies",
    "modulate",
    "modulation_parts",
]
