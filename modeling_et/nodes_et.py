"""
The Energy Transformer that classifies the nodes of graphs, such as fraud among customers (arXiv 2302.07253).

Shapes: ``N`` nodes, ``E`` edges, ``F`` features, ``D`` width, ``L`` labels, ``G`` graphs.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import can_return_tuple

from .configuration_energy_transformer import EnergyTransformerConfig
from .energies import precise
from .graph_layers import EdgeModulation, NodeTokens, Readout, check_edges, classification_loss, init_graph_layer
from .outputs_et import EnergyTransformerClassifierOutput
from .thinking_ebt import ThinkingConfig
from .transformer_et import EnergyTransformerModel, EnergyTransformerPreTrainedModel


class EnergyTransformerForNodeClassification(EnergyTransformerPreTrainedModel):
    r"""
    Energy Transformer with a label for every node. Nodes attend to their neighbours; the classifier reads the first
    and the last tokens, both normalised. Memory grows with the edges.

    Args:
        config ([`EnergyTransformerConfig`]): the architecture, with `num_node_features` and `num_labels`.

    Example:

    ```python
    >>> import torch
    >>> from ebt_transformers import EnergyTransformerConfig, EnergyTransformerForNodeClassification

    >>> config = EnergyTransformerConfig(
    ...     hidden_size=16, num_attention_heads=2, num_node_features=5, num_labels=2, thinking_steps=2
    ... )
    >>> model = EnergyTransformerForNodeClassification(config).eval()
    >>> edges = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    >>> model(torch.randn(3, 5), edges).logits.shape
    torch.Size([3, 2])
    ```
    """

    main_input_name = "node_features"
    _auto_class = "AutoModelForTokenClassification"  # nodes are the tokens; a saved model carries its code

    def __init__(self, config: EnergyTransformerConfig) -> None:
        super().__init__(config)
        self.nodes = NodeTokens(config)
        self.modulation = EdgeModulation(config) if config.edge_modulation == "pairwise" else None
        self.model = EnergyTransformerModel(config)
        self.classifier = Readout(config, 2 * config.hidden_size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not init_graph_layer(module, self.config.attention_initializer_range or 0.0):
            super()._init_weights(module)

    @can_return_tuple
    def forward(
        self,
        node_features: Tensor,
        edge_index: Tensor,
        edge_features: Tensor | None = None,
        edge_type: Tensor | None = None,
        positions: Tensor | None = None,
        graph_index: Tensor | None = None,
        labels: Tensor | None = None,
        thinking: ThinkingConfig | dict[str, Any] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_energies: bool | None = None,
        output_trajectory: bool | None = None,
        **kwargs: Any,
    ) -> EnergyTransformerClassifierOutput:
        """
        All inputs may have a first axis of 1, as [`GraphCollator`] makes them for nodes; logits then have it, too.

        Args:
            node_features (`torch.FloatTensor` of shape `(N, F)`): of every node.
            edge_index (`torch.LongTensor` of shape `(2, E)`): which node (first row) is attended to by which (second
                row). A graph without directions has every edge twice.
            edge_features (`torch.FloatTensor` of shape `(E, F')`, *optional*): with `edge_modulation="pairwise"`.
            edge_type (`torch.LongTensor` of shape `(E,)`, *optional*): relation of each edge, for models with several.
            positions (`torch.FloatTensor` of shape `(N, k)`, *optional*): eigenvectors of the Laplacian, for models
                with such positions.
            graph_index (`torch.LongTensor` of shape `(N,)`, *optional*): the graph of each node, if there are several.
            labels (`torch.LongTensor` of shape `(N,)`, *optional*): classes; -100 for nodes that do not count.
            thinking ([`ThinkingConfig`] or `dict`, *optional*): how to think; see [`EnergyTransformerModel.forward`].
            num_items_in_batch (`int`, *optional*): what the summed loss is divided by.
            output_energies, output_trajectory (`bool`, *optional*): return those.

        Returns:
            [`EnergyTransformerClassifierOutput`].

        Raises:
            ValueError: for inputs of the wrong shape or range, missing or superfluous ones, and as
                [`EnergyTransformerModel.forward`].
        """
        batched = node_features.dim() == 3
        if batched:
            node_features, edge_index = _only(node_features), _only(edge_index)
            given = (edge_features, edge_type, positions, graph_index, labels)
            edge_features, edge_type, positions, graph_index, labels = (
                None if each is None else _only(each) for each in given
            )
        start = self.nodes(node_features, positions, graph_index)
        check_edges(self.config, edge_index, edge_features, len(start))
        weights = None
        if self.modulation is not None:
            weights = self.modulation(start, edge_index, edge_features)
        walked = self.model(
            inputs_embeds=start,
            edge_index=edge_index,
            edge_weights=weights,
            edge_type=edge_type,
            graph_index=graph_index,
            thinking=thinking,
            output_energies=output_energies,
            output_trajectory=output_trajectory,
            **kwargs,
        )
        first = self.model.stack[0].norm(start.to(walked.last_hidden_state.dtype))
        found = torch.cat([first, self.model.norm(walked.last_hidden_state)], dim=-1)
        logits = precise(self.classifier(found.to(start.dtype)))
        loss = None
        if labels is not None:
            loss = classification_loss(self.config, logits, labels, num_items_in_batch)
        return EnergyTransformerClassifierOutput(
            loss=loss,
            logits=logits[None] if batched else logits,
            energies=walked.energies,
            steps_taken=walked.steps_taken,
            trajectory=walked.trajectory,
        )


def _only(batch: Tensor) -> Tensor:
    """The only entry of a batch."""
    if len(batch) != 1:
        raise ValueError(
            f"Graphs have different numbers of nodes: give several as one with `graph_index`, not {len(batch)} rows. "
            "GraphCollator does so."
        )
    return batch[0]


__all__ = ["EnergyTransformerForNodeClassification"]
