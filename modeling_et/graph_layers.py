"""
What the Energy Transformers for graphs put around the energy: nodes as tokens, edges that weigh, readouts.

Shapes: ``N`` nodes, ``E`` edges, ``F`` features, ``D`` width, ``H`` heads, ``L`` labels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init

from .configuration_energy_transformer import EnergyTransformerConfig
from .edges import check_edge_index
from .energies import EnergyLayerNorm, precise


class NodePositions(nn.Linear):
    """
    Eigenvectors of a graph's Laplacian to tokens. It starts small.

    A class of its own, because transformers initialises every parameter once, by the module that owns it.
    """


class LearnedPositions(nn.Embedding):
    """A vector for each node of one graph. They start small."""


class EdgeFactors(nn.Linear):
    """Numbers to a factor for each head, 1 at the start whatever they are. A class of its own as [`NodePositions`]."""


def init_graph_layer(module: nn.Module, spread: float) -> bool:
    """
    The start of a layer that does not start as others do.

    Args:
        module (`nn.Module`): any layer.
        spread (`float`): of small numbers.

    Returns:
        `bool`: whether it was such a layer.
    """
    if isinstance(module, EdgeFactors):
        init.zeros_(module.weight)
        init.ones_(module.bias)
    elif isinstance(module, (NodePositions, LearnedPositions)):
        init.normal_(module.weight, mean=0.0, std=spread)
    else:
        return False
    return True


def check_edges(config: EnergyTransformerConfig, edge_index: Tensor, features: Tensor | None, nodes: int) -> None:
    """
    Raises for edges and features of edges that a head cannot use.

    Args:
        config ([`EnergyTransformerConfig`]): says which features there are.
        edge_index (`torch.LongTensor` of shape `(2, E)`): the edges.
        features (`torch.FloatTensor` of shape `(E, F)`, *optional*): of every edge.
        nodes (`int`): how many there are.

    Raises:
        ValueError: for the wrong shape or range, and for features that are missing, superfluous or not finite.
    """
    check_edge_index(edge_index, nodes)
    if features is None:
        if config.num_edge_features:
            raise ValueError(
                f"`edge_features` is missing, but the model has `num_edge_features={config.num_edge_features}`."
            )
        return
    if not config.num_edge_features:
        raise ValueError("`edge_features` was given, but the model has `num_edge_features=0`.")
    expected = (edge_index.shape[1], config.num_edge_features)
    without_edges = features.numel() == 0 == expected[0]  # does not tell how many numbers an edge would have
    if tuple(features.shape) != expected and not without_edges:
        raise ValueError(f"`edge_features` must have shape {expected}: edges, features; got {tuple(features.shape)}.")
    if not bool(torch.isfinite(features).all()):
        raise ValueError("`edge_features` holds values that are not finite (NaN or infinity).")


class NodeTokens(nn.Module):
    """
    Nodes as tokens: a linear map of their features, and of their place in the graph.

    Args:
        config ([`EnergyTransformerConfig`]): says which features and positions there are.
    """

    def __init__(self, config: EnergyTransformerConfig) -> None:
        super().__init__()
        if config.num_node_features is None:
            raise ValueError("The config of a model for graphs needs `num_node_features`.")
        self.config = config
        self.features = nn.Linear(config.num_node_features, config.hidden_size)
        self.positions: nn.Module | None = None
        if config.position_embedding == "laplacian":
            self.positions = NodePositions(config.num_positions or 1, config.hidden_size, bias=False)
        elif config.position_embedding == "learned":
            self.positions = LearnedPositions(config.num_positions or 1, config.hidden_size)

    def forward(self, features: Tensor, positions: Tensor | None, graph_index: Tensor | None) -> Tensor:
        """
        Args:
            features (`torch.FloatTensor` of shape `(N, F)`): of every node.
            positions (`torch.FloatTensor` of shape `(N, k)`, *optional*): eigenvectors of each graph's Laplacian.
                Their signs mean nothing; in training each is flipped or not, for each graph.
            graph_index (`torch.LongTensor` of shape `(N,)`, *optional*): the graph of each node.

        Returns:
            Tokens `(N, D)`.

        Raises:
            ValueError: for features and positions of the wrong shape, or missing ones.
        """
        config = self.config
        if features.dim() != 2 or features.shape[1] != config.num_node_features or len(features) == 0:
            raise ValueError(
                f"`node_features` must be a non-empty tensor (nodes, {config.num_node_features}), got shape "
                f"{tuple(features.shape)}."
            )
        if not bool(torch.isfinite(features).all()):
            raise ValueError("`node_features` holds values that are not finite (NaN or infinity).")
        tokens = self.features(features.to(self.features.weight.dtype))
        if (positions is not None) != (config.position_embedding == "laplacian"):
            raise ValueError(
                f"`positions` {'is missing' if positions is None else 'was given'}, but the model has "
                f"`position_embedding={config.position_embedding!r}`. GraphCollator adds them where they are needed."
            )
        if self.positions is None:
            return tokens
        if positions is None:  # learned
            if len(features) != config.num_positions:
                raise ValueError(
                    f"The model learned positions of the {config.num_positions} nodes of its graph, got "
                    f"{len(features)} nodes."
                )
            return tokens + self.positions.weight
        if tuple(positions.shape) != (len(features), config.num_positions):
            raise ValueError(
                f"`positions` must have shape ({len(features)}, {config.num_positions}): nodes, eigenvectors; got "
                f"{tuple(positions.shape)}."
            )
        if self.training:
            graphs = 1 if graph_index is None else int(graph_index.max()) + 1
            signs = torch.randint(0, 2, (graphs, positions.shape[1]), device=positions.device) * 2 - 1
            positions = positions * (signs if graph_index is None else signs[graph_index])
        return tokens + self.positions(positions.to(tokens.dtype))


class EdgeModulation(nn.Module):
    """
    The factor on the logits of every edge and head: a learned function of its two nodes times one of its features,
    computed once from the first tokens (eq. 25).

    The paper's function is a convolution of 3 x 3 over the matrix of all pairs, whose result depends on the order in
    which nodes happen to be numbered, and which needs all pairs. Here each pair is judged by itself: a linear map of
    the products of its nodes' numbers, symmetric in the two.

    Args:
        config ([`EnergyTransformerConfig`]): sizes.
    """

    def __init__(self, config: EnergyTransformerConfig) -> None:
        super().__init__()
        self.num_edge_features = config.num_edge_features
        self.norm = EnergyLayerNorm(config)
        self.pair = EdgeFactors(config.hidden_size, config.num_attention_heads)
        self.features: nn.Module | None = None
        if config.num_edge_features:
            self.features = EdgeFactors(config.num_edge_features, config.num_attention_heads)

    def forward(self, tokens: Tensor, edge_index: Tensor, features: Tensor | None) -> Tensor:
        """
        Args:
            tokens (`torch.FloatTensor` of shape `(N, D)`): the first ones.
            edge_index (`torch.LongTensor` of shape `(2, E)`): their edges.
            features (`torch.FloatTensor` of shape `(E', F)`, *optional*): of the first `E'` edges; the others, between
                nodes and their graph's CLS token, have none.

        Returns:
            Factors `(E, H)`, all of them 1 at the start.
        """
        normed = self.norm(tokens)
        factors = self.pair(normed[edge_index[0]] * normed[edge_index[1]])
        if features is None or self.features is None:
            return factors
        if len(features) == 0:  # graphs without edges may not tell how many numbers an edge has
            features = features.new_zeros(0, self.num_edge_features)
        given = self.features(features.to(factors.dtype))
        return factors * torch.cat([given, given.new_ones(len(factors) - len(given), given.shape[1])])


class Readout(nn.Sequential):
    """
    From what was found to scores: dropout, a hidden layer unless there shall be none, and a linear map.

    Args:
        config ([`EnergyTransformerConfig`]): sizes.
        inputs (`int`): width of what was found.
    """

    def __init__(self, config: EnergyTransformerConfig, inputs: int) -> None:
        hidden = config.readout_size or 0
        layers: list[nn.Module] = [nn.Dropout(config.classifier_dropout)]
        if hidden:
            layers += [nn.Linear(inputs, hidden), nn.ReLU()]
        super().__init__(*layers, nn.Linear(hidden or inputs, config.num_labels))


def classification_loss(
    config: EnergyTransformerConfig, logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None
) -> Tensor:
    """
    Cross-entropy of labelled rows, each multiplied by the weight of its class.

    Args:
        config ([`EnergyTransformerConfig`]): class weights and label smoothing.
        logits (`torch.FloatTensor` of shape `(N, L)`): scores.
        labels (`torch.LongTensor` of shape `(N,)`): classes; -100 for rows that do not count.
        num_items_in_batch (`int` or `Tensor`, *optional*): what the sum is divided by, instead of the rows that count.

    Returns:
        `torch.FloatTensor` of shape `()`.

    Raises:
        ValueError: for labels of the wrong shape or out of range, and if none counts.
    """
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"`labels` must have shape {tuple(logits.shape[:1])}, got {tuple(labels.shape)}.")
    counted = labels[labels != -100]
    if len(counted) == 0:
        raise ValueError("No row counts in the loss: all `labels` are -100.")
    if not 0 <= int(counted.min()) <= int(counted.max()) < logits.shape[1]:
        raise ValueError(
            f"`labels` must be between 0 and {logits.shape[1] - 1}, or -100 for rows that do not count, got "
            f"{int(counted.min())} to {int(counted.max())}. Set `num_labels` in the config."
        )
    weights = None
    if config.class_weights is not None:
        if len(config.class_weights) != logits.shape[1]:
            raise ValueError(
                f"`class_weights` must hold {logits.shape[1]} numbers, one for each label, got "
                f"{len(config.class_weights)}."
            )
        weights = torch.tensor(config.class_weights, dtype=precise(logits).dtype, device=logits.device)
    total = functional.cross_entropy(
        precise(logits), labels, weight=weights, reduction="sum", label_smoothing=float(config.label_smoothing)
    )
    return total / (len(counted) if num_items_in_batch is None else num_items_in_batch)


__all__ = [
    "EdgeFactors",
    "EdgeModulation",
    "LearnedPositions",
    "NodePositions",
    "NodeTokens",
    "Readout",
    "check_edges",
    "classification_loss",
    "init_graph_layer",
]
