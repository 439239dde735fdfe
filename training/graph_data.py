"""
Graphs as a model takes them: plain rows (see `graph_loading.py`) to tensors, and several graphs to one batch.

Shapes: ``n`` nodes of a graph, ``E`` edges, ``F`` features, ``G`` graphs of a batch, ``N`` nodes of all of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .graph_loading import (
    UNKNOWN,
    degree_features,
    edge_array,
    load_anomaly,
    load_tu,
    merge_relations,
    one_hot,
    undirected,
)
from .graph_positions import add_positions, laplacian_positions


TASKS = ("graph", "node")
PACKAGES = "'ebt-transformers[evaluate]'"
VALIDATION_SHARE = 0.33  # of what is not for training; the rest tests (Tang et al. 2022)
SWITCHED_OFF = 1e12  # a scale that leaves nothing of a feature, and can be undone
REMEMBERED = 4  # batches of a single graph that a collator keeps: one each for training, validation and test


@dataclass(frozen=True, eq=False)
class Graph:
    """
    A graph as tensors, checked.

    Args:
        node_features (`torch.FloatTensor` of shape `(n, F)`): of its nodes.
        edge_index (`torch.LongTensor` of shape `(2, E)`): which node is attended to by which.
        label (`torch.LongTensor` of shape `()` or `(n,)`, *optional*): class of the graph, or of each node.
        edge_features (`torch.FloatTensor` of shape `(E, F')`, *optional*): of its edges.
        edge_type (`torch.LongTensor` of shape `(E,)`, *optional*): relation of each edge.
        positions (`torch.FloatTensor` of shape `(n, k)`, *optional*): of its nodes.
    """

    node_features: Tensor
    edge_index: Tensor
    label: Tensor | None = None
    edge_features: Tensor | None = None
    edge_type: Tensor | None = None
    positions: Tensor | None = None

    @classmethod
    def from_row(cls, row: Mapping[str, Any], task: str = "graph") -> "Graph":
        """
        A graph from a row of a table.

        Args:
            row (mapping): `node_feat`, `edge_index` and, where there are such, `num_nodes`, `y`, `edge_attr`,
                `edge_type` and `positions`: arrays or nested lists.
            task (`str`, *optional*, defaults to `"graph"`): `"graph"` or `"node"`: what `y` belongs to.

        Raises:
            ValueError: for rows that lack something, or whose parts do not fit together.
        """
        _check_task(task)
        missing = [name for name in ("node_feat", "edge_index") if row.get(name) is None]
        if missing:
            raise ValueError(
                f"A graph lacks {', '.join(missing)}; its columns: {', '.join(row) or 'none'}. (With a Trainer set "
                "`remove_unused_columns=False`, as EnergyTransformerTrainingArguments does.)"
            )
        features = _floats("node_feat", row["node_feat"])
        nodes = len(features)
        if nodes == 0 or row.get("num_nodes", nodes) != nodes:
            raise ValueError(f"A graph has {row.get('num_nodes', nodes)} nodes, and `node_feat` {nodes} rows.")
        edges = row["edge_index"]
        edges = torch.from_numpy(edge_array(np.zeros((2, 0), np.int64) if len(edges) == 0 else edges, nodes))
        count = edges.shape[1]
        label = row.get("y")
        kinds = None if row.get("edge_type") is None else torch.as_tensor(np.asarray(row["edge_type"], dtype=np.int64))
        if kinds is not None and tuple(kinds.shape) != (count,):
            raise ValueError(f"`edge_type` must hold {count} numbers, one for each edge, got {tuple(kinds.shape)}.")
        return cls(
            node_features=features,
            edge_index=edges,
            label=None if label is None else _label(label, task, nodes),
            edge_features=None if row.get("edge_attr") is None else _floats("edge_attr", row["edge_attr"], count),
            edge_type=kinds,
            positions=None if row.get("positions") is None else _floats("positions", row["positions"], nodes),
        )

    def with_labels(self, keep: Any) -> "Graph":
        """
        The same graph, of whose nodes only some show their label.

        Args:
            keep (array-like of `bool` of shape `(n,)`): which.

        Raises:
            ValueError: for a graph whose nodes have no labels.
        """
        if self.label is None or self.label.dim() != 1:
            raise ValueError("The nodes of this graph have no labels.")
        return replace(self, label=self.label.masked_fill(~torch.as_tensor(np.asarray(keep, dtype=bool)), UNKNOWN))

    def with_positions(self, k: int) -> "Graph":
        """The same graph with `k` positions for each node ([`laplacian_positions`]), in place of those it has."""
        found = laplacian_positions(self.edge_index.numpy(), len(self.node_features), k)
        return replace(self, positions=torch.from_numpy(found))

    def with_self_loops(self) -> "Graph":
        """
        The same graph with an edge from each node to itself, for models with `self_attention`; of every relation one.
        Features of such edges are zeros.
        """
        kept = self.edge_index[0] != self.edge_index[1]
        relations = 1 if self.edge_type is None else int(self.edge_type.max()) + 1 if len(self.edge_type) else 1
        loops = torch.arange(len(self.node_features)).repeat(relations)
        kinds, features = self.edge_type, self.edge_features
        if kinds is not None:
            kinds = torch.cat([kinds[kept], torch.arange(relations).repeat_interleave(len(self.node_features))])
        if features is not None:
            features = torch.cat([features[kept], features.new_zeros(len(loops), features.shape[1])])
        edges = torch.cat([self.edge_index[:, kept], torch.stack([loops, loops])], dim=1)
        return replace(self, edge_index=edges, edge_type=kinds, edge_features=features)


def _check_task(task: str) -> None:
    if task not in TASKS:
        raise ValueError(f"`task` must be one of {', '.join(TASKS)}, got {task!r}.")


def _floats(name: str, values: Any, rows: int | None = None) -> Tensor:
    try:
        found = torch.as_tensor(np.asarray(values, dtype=np.float32))
    except (ValueError, TypeError) as error:
        raise ValueError(f"`{name}` must be a table of numbers, each row of the same length: {error}") from error
    if rows == 0 and found.numel() == 0:
        return found.reshape(0, found.shape[1] if found.dim() == 2 else 0)
    if found.dim() != 2 or (rows is not None and len(found) != rows):
        wanted = "rows" if rows is None else rows
        raise ValueError(f"`{name}` must have shape ({wanted}, numbers of each), got {tuple(found.shape)}.")
    return found


def _label(value: Any, task: str, nodes: int) -> Tensor:
    label = np.asarray(value)
    if label.dtype.kind == "f" and (label == np.round(label)).all():  # some tables keep classes as 1.0
        label = label.astype(np.int64)
    wanted = nodes if task == "node" else 1
    if label.dtype.kind not in "iub" or label.size != wanted:
        what = f"{nodes} classes, one for each node" if task == "node" else "the class of the graph, [c] or c"
        raise ValueError(f"`y` must hold {what}, got {label.dtype} of shape {label.shape}.")
    found = torch.from_numpy(label.astype(np.int64))
    return found.reshape(nodes) if task == "node" else found.reshape(())


# ---- batches ---------------------------------------------------------------------------------------------------


class GraphCollator:
    r"""
    Several graphs as the inputs of one call: side by side without padding, their nodes numbered through, so that none
    feels the others. `labels` come first, because a Trainer counts rows by the first tensor.

    Args:
        task (`str`, *optional*, defaults to `"graph"`):
            `"graph"` for [`EnergyTransformerForGraphClassification`]: labels `(G,)`. `"node"` for
            [`EnergyTransformerForNodeClassification`]: labels `(1, N)`, and all other inputs with a first axis of 1,
            too.
        num_positions (`int`, *optional*):
            Laplacian eigenvectors that nodes get ([`laplacian_positions`]); graphs with `positions` give their first
            ones. `None`: positions of graphs that have some, all of them.

    Raises:
        ValueError: for another task, positions below 1, graphs that cannot be in one batch, and graphs with fewer
            positions than asked for.

    Example:

    ```python
    >>> from ebt_transformers import GraphCollator

    >>> graph = {"edge_index": [[0, 1], [1, 0]], "num_nodes": 2, "node_feat": [[1.0], [0.5]], "y": [1]}
    >>> batch = GraphCollator(num_positions=1)([graph, graph])
    >>> {name: tuple(value.shape) for name, value in batch.items()}
    {'labels': (2,), 'node_features': (4, 1), 'edge_index': (2, 4), 'positions': (4, 1), 'graph_index': (4,)}
    ```
    """

    def __init__(self, task: str = "graph", num_positions: int | None = None) -> None:
        _check_task(task)
        if num_positions is not None and num_positions < 1:
            raise ValueError(f"`num_positions` must be at least 1, got {num_positions}.")
        self.task, self.num_positions = task, num_positions
        self._remembered: list[tuple[Graph, dict[str, Tensor]]] = []

    def __call__(self, rows: Sequence[Graph | Mapping[str, Any]]) -> dict[str, Tensor]:
        """
        Args:
            rows (list of [`Graph`], or of rows as in [`Graph.from_row`]): at least one.

        Returns:
            `dict` of model inputs: `labels` (unless the graphs have none), `node_features`, `edge_index`,
            `edge_features`, `edge_type` and `positions` (where there are such) and `graph_index`.
        """
        if not rows:
            raise ValueError("A batch needs at least one graph.")
        only = rows[0] if len(rows) == 1 and isinstance(rows[0], Graph) else None
        if only is None:
            return self._collate(rows)
        # a set of one graph is the same batch at every step
        for graph, batch in self._remembered:
            if graph is only:
                return dict(batch)
        batch = self._collate(rows)
        self._remembered = [*self._remembered[-REMEMBERED + 1 :], (only, batch)]
        return dict(batch)

    def _collate(self, rows: Sequence[Graph | Mapping[str, Any]]) -> dict[str, Tensor]:
        graphs = [row if isinstance(row, Graph) else Graph.from_row(row, self.task) for row in rows]
        sizes = torch.tensor([len(graph.node_features) for graph in graphs])
        shifts = torch.cumsum(sizes, 0) - sizes
        values: dict[str, Tensor | None] = {
            "labels": self._labels(graphs),
            "node_features": _joined("node_feat", [graph.node_features for graph in graphs]),
            "edge_index": torch.cat(
                [graph.edge_index + shift for graph, shift in zip(graphs, shifts, strict=True)], dim=1
            ),
            "edge_features": _joined("edge_attr", [graph.edge_features for graph in graphs]),
            "edge_type": _joined("edge_type", [graph.edge_type for graph in graphs]),
            "positions": _joined("positions", [self._positions(graph) for graph in graphs]),
            "graph_index": torch.repeat_interleave(torch.arange(len(graphs)), sizes),
        }
        batch = {name: value for name, value in values.items() if value is not None}
        return {name: value[None] for name, value in batch.items()} if self.task == "node" else batch

    def _labels(self, graphs: list[Graph]) -> Tensor | None:
        labels = [graph.label for graph in graphs]
        dims = 1 if self.task == "node" else 0
        if any(label is not None and label.dim() != dims for label in labels):
            raise ValueError(f"The labels of these graphs are not those of task {self.task!r}.")
        given = [label if label is None or dims else label[None] for label in labels]
        return _joined("y", given)

    def _positions(self, graph: Graph) -> Tensor | None:
        if self.num_positions is None:
            return graph.positions
        if graph.positions is None:
            return graph.with_positions(self.num_positions).positions
        if graph.positions.shape[1] < self.num_positions:
            raise ValueError(
                f"A graph has {graph.positions.shape[1]} positions for each node, and {self.num_positions} are asked "
                "for. Leave the column `positions` out to have them computed."
            )
        return graph.positions[:, : self.num_positions]


def _joined(name: str, values: Sequence[Tensor | None]) -> Tensor | None:
    given = [value for value in values if value is not None]
    if not given:
        return None
    if len(given) != len(values):
        raise ValueError(f"Some graphs of a batch have `{name}` and some have not.")
    # graphs without edges may not tell how many numbers an edge has
    filled = [value for value in given if value.numel()] or given[:1]
    widths = sorted({value.shape[1] for value in filled if value.dim() == 2})
    if len(widths) > 1:
        raise ValueError(f"`{name}` of the graphs of a batch have different widths: {', '.join(map(str, widths))}.")
    return torch.cat(filled)


# ---- one graph, many nodes -------------------------------------------------------------------------------------


def node_splits(labels: Any, train_share: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Which nodes train, validate and test: a random share of every class trains; of the others 33 % validate and 67 %
    test (the protocol of Tang et al. 2022). Nodes without a label (-100) are in none.

    Args:
        labels (array-like of `int` of shape `(n,)`): class of each node, -100 where unknown.
        train_share (`float`): share that trains, above 0 and below 1.
        seed (`int`): another seed, another split.

    Returns:
        Three `np.ndarray` of `bool` and shape `(n,)`: train, validation, test.

    Raises:
        ValueError: for a share out of range, labels of another shape, and if one of the three would lack a class.
        ImportError: if scikit-learn is missing.

    Example:

    ```python
    >>> from ebt_transformers.training.graph_data import node_splits

    >>> [int(split.sum()) for split in node_splits([0] * 90 + [1] * 10, train_share=0.4, seed=0)]
    [40, 19, 41]
    ```
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iub":
        raise ValueError(f"`labels` must be whole numbers (nodes,), got {labels.dtype} of shape {labels.shape}.")
    if not 0 < train_share < 1:
        raise ValueError(f"`train_share` must be above 0 and below 1, got {train_share}.")
    try:
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError(f"Splitting nodes needs scikit-learn: pip install {PACKAGES}.") from error
    known = np.flatnonzero(labels != UNKNOWN)
    try:
        train, rest = train_test_split(known, stratify=labels[known], train_size=train_share, random_state=seed)
        validation, test = train_test_split(
            rest, stratify=labels[rest], train_size=VALIDATION_SHARE, random_state=seed
        )
    except ValueError as error:
        raise ValueError(f"{len(known)} labelled nodes cannot be split so: {error}") from error
    masks = []
    for name, chosen in (("train", train), ("validate", validation), ("test", test)):
        lacking = sorted(set(labels[known].tolist()) - set(labels[chosen].tolist()))
        if lacking:
            raise ValueError(
                f"None of the nodes to {name} has class {lacking[0]}, of which there are "
                f"{int((labels == lacking[0]).sum())}: `train_share={train_share}` leaves it none. Choose another one."
            )
        mask = np.zeros(len(labels), dtype=bool)
        mask[chosen] = True
        masks.append(mask)
    return masks[0], masks[1], masks[2]


@dataclass(frozen=True)
class Standardisation:
    """
    Features moved and scaled so that those of the training nodes have mean 0 and deviation 1. Columns of nothing but
    zeros and ones are left as they are. Other columns that never change there are switched off: nothing can be learned
    from them, and elsewhere they may be as large as they like.

    Args:
        mean (`torch.FloatTensor` of shape `(F,)`), scale (`torch.FloatTensor` of shape `(F,)`): `(x - mean) / scale`.
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, features: Any) -> "Standardisation":
        """That of these features, `(n, F)`: of the nodes that train only."""
        found = torch.as_tensor(np.asarray(features), dtype=torch.float64)
        mean, scale = found.mean(0), found.std(0, correction=0)
        left = ((found == 0) | (found == 1)).all(0)
        scale = scale.masked_fill(scale <= 1e-12 * mean.abs().clamp(min=1), SWITCHED_OFF)
        return cls(mean.masked_fill(left, 0.0).float(), scale.masked_fill(left, 1.0).float())

    def apply(self, features: Tensor) -> Tensor:
        """Standardised features, `(n, F)` as given."""
        return (features - self.mean) / self.scale

    @torch.no_grad()
    def build_into(self, layer: nn.Linear) -> None:
        """Changes a linear map of standardised features into the same map of features as they are."""
        mean, scale = (value.to(layer.weight.device, torch.float64) for value in (self.mean, self.scale))
        weight = layer.weight.double() / scale
        layer.bias.copy_(layer.bias.double() - weight @ mean)
        layer.weight.copy_(weight)

    @torch.no_grad()
    def take_out_of(self, layer: nn.Linear) -> None:
        """Changes a linear map of features as they are into the same map of standardised ones."""
        mean, scale = (value.to(layer.weight.device, torch.float64) for value in (self.mean, self.scale))
        layer.bias.copy_(layer.bias.double() + layer.weight.double() @ mean)
        layer.weight.copy_(layer.weight.double() * scale)


__all__ = [
    "UNKNOWN",
    "Graph",
    "GraphCollator",
    "Standardisation",
    "add_positions",
    "degree_features",
    "laplacian_positions",
    "load_anomaly",
    "load_tu",
    "merge_relations",
    "node_splits",
    "one_hot",
    "undirected",
]
