"""The Energy Transformer (arXiv 2302.07253): its energies, and the models that descend them."""

from .completion_et import EnergyTransformerForImageCompletion
from .graphs_et import EnergyTransformerForGraphClassification
from .nodes_et import EnergyTransformerForNodeClassification
from .outputs_et import (
    EnergyTransformerClassifierOutput,
    EnergyTransformerCompletionOutput,
    EnergyTransformerModelOutput,
)
from .transformer_et import EnergyTransformerModel, EnergyTransformerPreTrainedModel


__all__ = [
    "EnergyTransformerClassifierOutput",
    "EnergyTransformerCompletionOutput",
    "EnergyTransformerForGraphClassification",
    "EnergyTransformerForImageCompletion",
    "EnergyTransformerForNodeClassification",
    "EnergyTransformerModel",
    "EnergyTransformerModelOutput",
    "EnergyTransformerPreTrainedModel",
]
