"""
The Energy Transformer that classifies whole graphs, such as molecules (arXiv 2302.07253).

Shapes: ``G`` graphs, ``N`` nodes of all of them, ``E`` edges, ``F`` features, ``D`` width, ``L`` labels.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils import can_return_tuple

from .configuration_energy_transformer import EnergyTransformerConfig
from .energies import precise
from .graph_layers import EdgeModulation, NodeTokens, Readout, check_edges, classification_loss, init_graph_layer
from .outputs_et import EnergyTransformerClassifierOutput
from .thinking_ebt import ThinkingConfig
from .transformer_et import EnergyTransformerModel, EnergyTransformerPreTrainedModel


class EnergyTransformerForGraphClassification(EnergyTransformerPreTrainedModel):
    r"""
    Energy Transformer with a label for every graph. Nodes attend to their neighbours, and to and from a CLS token of
    their graph, which the classifier reads. The graphs of a batch lie side by side without padding, so that none feels
    the others.

    Args:
        config ([`EnergyTransformerConfig`]): the architecture, with `num_node_features` and `num_labels`.

    Example:

    ```python
    >>> import torch
    >>> from ebt_transformers import EnergyTransformerConfig, EnergyTransformerForGraphClassification

    >>> config = EnergyTransformerConfig(hidden_size=16, num_attention_heads=2, num_node_features=5, num_labels=3)
    >>> model = EnergyTransformerForGraphClassification(config).eval()
    >>> edges = torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]])
    >>> model(torch.randn(4, 5), edges, graph_index=torch.tensor([0, 0, 1, 1])).logits.shape
    torch.Size([2, 3])
    ```
    """

    main_input_name = "node_features"
    _auto_class = "AutoModelForSequenceClassification"  # a graph is a set of tokens; a saved model carries its code

    def __init__(self, config: EnergyTransformerConfig) -> None:
        super().__init__(config)
        if config.num_relations > 1:
            raise ValueError(
                f"`num_relations={config.num_relations}` is for nodes; here edges have features "
                "(`num_edge_features`, `edge_modulation='pairwise'`)."
            )
        if config.position_embedding == "learned":
            raise ValueError("`position_embedding='learned'` is for the nodes of one graph; here use 'laplacian'.")
        self.nodes = NodeTokens(config)
        self.cls_token = nn.Parameter(torch.empty(config.hidden_size))
        self.modulation = EdgeModulation(config) if config.edge_modulation == "pairwise" else None
        self.model = EnergyTransformerModel(config)
        self.classifier = Readout(config, config.hidden_size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not init_graph_layer(module, self.config.attention_initializer_range or 0.0):
            super()._init_weights(module)
        if module is self:
            init.normal_(self.cls_token, mean=0.0, std=self.config.initializer_range)

    @can_return_tuple
    def forward(
        self,
        node_features: Tensor,
        edge_index: Tensor,
        edge_features: Tensor | None = None,
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
        Args:
            node_features (`torch.FloatTensor` of shape `(N, F)`): of every node of every graph.
            edge_index (`torch.LongTensor` of shape `(2, E)`): which node (first row) is attended to by which (second
                row), numbered over all graphs. A graph without directions has every edge twice.
            edge_features (`torch.FloatTensor` of shape `(E, F')`, *optional*): with `edge_modulation="pairwise"`.
            positions (`torch.FloatTensor` of shape `(N, k)`, *optional*): eigenvectors of each graph's Laplacian, for
                models with such positions.
            graph_index (`torch.LongTensor` of shape `(N,)`, *optional*): the graph of each node, from 0; by default
                all are one graph.
            labels (`torch.LongTensor` of shape `(G,)`, *optional*): class of each graph.
            thinking ([`ThinkingConfig`] or `dict`, *optional*): how to think; see [`EnergyTransformerModel.forward`].
            num_items_in_batch (`int`, *optional*): what the summed loss is divided by.
            output_energies, output_trajectory (`bool`, *optional*): return those; the trajectory ends with the tokens
                of the graphs.

        Returns:
            [`EnergyTransformerClassifierOutput`].

        Raises:
            ValueError: for inputs of the wrong shape or range, missing or superfluous ones, edges between graphs,
                graphs without nodes, and as [`EnergyTransformerModel.forward`].
        """
        nodes = self.nodes(node_features, positions, graph_index)
        graphs = torch.zeros(len(nodes), dtype=torch.long, device=nodes.device) if graph_index is None else graph_index
        check_edges(self.config, edge_index, edge_features, len(nodes))
        count = _count_graphs(graphs, len(nodes), edge_index)
        tokens = torch.cat([nodes, self.cls_token.to(nodes.dtype).expand(count, -1)])
        members = torch.arange(len(nodes), device=nodes.device)
        heads = torch.arange(count, device=nodes.device) + len(nodes)
        with_cls = torch.stack([torch.cat([members, heads[graphs]]), torch.cat([heads[graphs], members])])
        edges = torch.cat([edge_index, with_cls, torch.stack([heads, heads])], dim=1)
        weights = None
        if self.modulation is not None:
            weights = self.modulation(tokens, edges, edge_features)
        walked = self.model(
            inputs_embeds=tokens,
            edge_index=edges,
            edge_weights=weights,
            graph_index=torch.cat([graphs, torch.arange(count, device=nodes.device)]),
            num_graphs=count,
            thinking=thinking,
            output_energies=output_energies,
            output_trajectory=output_trajectory,
            **kwargs,
        )
        found = self.model.norm(walked.last_hidden_state[len(nodes) :])
        logits = precise(self.classifier(found.to(nodes.dtype)))
        loss = None
        if labels is not None:
            loss = classification_loss(self.config, logits, labels, num_items_in_batch)
        return EnergyTransformerClassifierOutput(
            loss=loss,
            logits=logits,
            energies=walked.energies,
            steps_taken=walked.steps_taken,
            trajectory=walked.trajectory,
        )


def _count_graphs(graphs: Tensor, nodes: int, edge_index: Tensor) -> int:
    """How many graphs there are; raises unless they are numbered from 0, have nodes, and no edges between them."""
    if tuple(graphs.shape) != (nodes,):
        raise ValueError(
            f"`graph_index` must have shape ({nodes},), one graph for each node, got {tuple(graphs.shape)}."
        )
    found = torch.unique(graphs)
    if not torch.equal(found, torch.arange(len(found), device=graphs.device)):
        raise ValueError("`graph_index` must number the graphs from 0 without gaps; a graph has at least one node.")
    if bool((graphs[edge_index[0]] != graphs[edge_index[1]]).any()):
        raise ValueError("`edge_index` has edges between nodes of different graphs.")
    return len(found)


__all__ = ["EnergyTransformerForGraphClassification"]
