"""What the models return."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class EnergyTransformerModelOutput(ModelOutput):
    """
    Output of [`EnergyTransformerModel`]. ``B`` samples (images, graphs), ``N`` tokens, ``D`` width, ``S`` blocks,
    ``T`` steps of each. Tokens of graphs have no axis ``B``.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(B, N, D)` or `(N, D)`): the tokens after the last step.
        energies (`torch.FloatTensor` of shape `(B, S, T + 1)`, *optional*): energy of each block before every step of
            its own and after the last one; with `output_energies=True`.
        steps_taken (`torch.LongTensor` of shape `(B, S)`): steps that moved the sample.
        trajectory (`torch.FloatTensor` of shape `(B, S * T + 1, N, D)` or `(S * T + 1, N, D)`, *optional*): the tokens
            at the start and after every step; with `output_trajectory=True`.
    """

    last_hidden_state: torch.Tensor | None = None
    energies: torch.Tensor | None = None
    steps_taken: torch.Tensor | None = None
    trajectory: torch.Tensor | None = None


@dataclass
class EnergyTransformerCompletionOutput(ModelOutput):
    """
    Output of [`EnergyTransformerForImageCompletion`]. ``B`` images, ``C`` channels, ``H x W`` pixels, ``S`` blocks,
    ``T`` steps of each.

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*): `config.completion_loss`, where patches were masked.
        reconstruction (`torch.FloatTensor` of shape `(B, C, H, W)`): the image as decoded, all patches of it.
        energies (`torch.FloatTensor` of shape `(B, S, T + 1)`, *optional*): see [`EnergyTransformerModelOutput`].
        steps_taken (`torch.LongTensor` of shape `(B, S)`): steps that moved the image.
        trajectory (`torch.FloatTensor` of shape `(B, S * T + 1, C, H, W)`, *optional*): the image decoded at the start
            and after every step; with `output_trajectory=True`.
    """

    loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    energies: torch.Tensor | None = None
    steps_taken: torch.Tensor | None = None
    trajectory: torch.Tensor | None = None


@dataclass
class EnergyTransformerClassifierOutput(ModelOutput):
    """
    Output of [`EnergyTransformerForNodeClassification`] and [`EnergyTransformerForGraphClassification`]. ``G`` graphs,
    ``L`` labels, ``S`` blocks, ``T`` steps of each.

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*): cross-entropy, if labels are given.
        logits (`torch.FloatTensor` of shape `(G, L)`; of nodes `(N, L)`, or `(1, N, L)` if they were given so): scores
            before the softmax.
        energies (`torch.FloatTensor` of shape `(G, S, T + 1)`, *optional*): see [`EnergyTransformerModelOutput`].
        steps_taken (`torch.LongTensor` of shape `(G, S)`): steps that moved each graph.
        trajectory (`torch.FloatTensor` of shape `(S * T + 1, N, D)`, *optional*): the tokens at the start and after
            every step; with `output_trajectory=True`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    energies: torch.Tensor | None = None
    steps_taken: torch.Tensor | None = None
    trajectory: torch.Tensor | None = None


__all__ = [
    "EnergyTransformerClassifierOutput",
    "EnergyTransformerCompletionOutput",
    "EnergyTransformerModelOutput",
]
