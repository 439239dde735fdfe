"""
Graphs from files, as rows with the column names of the Hub's graph data sets.

A row holds `edge_index` (2, E), `num_nodes`, `node_feat` (n, F) and, where there are such, `edge_attr` (E, F'),
`edge_type` (E,), `positions` (n, k) and `y`: the class of the graph, or of each of its nodes (-100 where unknown).
``n`` nodes, ``E`` edges.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .datasets_library import datasets_library


if TYPE_CHECKING:
    import datasets

UNKNOWN = -100  # what stands for the label of a node that has none; losses and metrics pass over it
MOST_DEGREES = 64  # columns of the features that graphs without any get; larger degrees share the last one
# what files call the same thing; the first that is there is taken
FEATURE_KEYS = ("x", "node_features", "node_feat", "prior")
LABEL_KEYS = ("y", "node_labels")
EDGE_KEYS = ("edge_index", "edges")
RELATION_PREFIX = "edge_index_"


def one_hot(values: Any, num_classes: int | None = None) -> np.ndarray:
    """
    Whole numbers as rows of zeros with a one.

    Args:
        values (array-like of shape `(n,)`): whole numbers from 0.
        num_classes (`int`, *optional*): columns; `None` means the largest value + 1.

    Returns:
        `np.ndarray` of shape `(n, num_classes)`, float32.

    Raises:
        ValueError: for values that are not whole numbers from 0 to `num_classes - 1`.

    Example:

    ```python
    >>> from ebt_transformers.training.graph_data import one_hot

    >>> one_hot([0, 2]).tolist()
    [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    ```
    """
    values = np.asarray(values)
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iub"):
        raise ValueError(f"Expected whole numbers (n,), got {values.dtype} of shape {values.shape}.")
    values = values.astype(np.int64)
    count = (int(values.max()) + 1 if values.size else 0) if num_classes is None else num_classes
    if values.size and not 0 <= values.min() <= values.max() < count:
        raise ValueError(f"Expected numbers from 0 to {count - 1}, got {values.min()} to {values.max()}.")
    rows = np.zeros((len(values), count), dtype=np.float32)
    rows[np.arange(len(values)), values] = 1.0
    return rows


def undirected(edge_index: Any, num_nodes: int, self_loops: bool = False) -> np.ndarray:
    """
    Every edge in both directions and once each, in ascending order.

    Args:
        edge_index (array-like of shape `(2, E)`): edges in one direction or both, in any order, also repeated.
        num_nodes (`int`): nodes of the graph.
        self_loops (`bool`, *optional*, defaults to `False`): an edge from each node to itself, or none from any.

    Returns:
        `np.ndarray` of shape `(2, E')`, int64.

    Raises:
        ValueError: for edges of another shape or between nodes that there are not.

    Example:

    ```python
    >>> from ebt_transformers.training.graph_data import undirected

    >>> undirected([[0, 1, 1], [1, 0, 1]], 2).tolist()
    [[0, 1], [1, 0]]
    ```
    """
    edges = edge_array(edge_index, num_nodes)
    both = np.concatenate([edges, edges[::-1]], axis=1)
    both = both[:, both[0] != both[1]]
    if self_loops:
        both = np.concatenate([both, np.tile(np.arange(num_nodes), (2, 1))], axis=1)
    keys = np.unique(both[0] * num_nodes + both[1])
    return np.stack([keys // num_nodes, keys % num_nodes]) if len(keys) else np.zeros((2, 0), dtype=np.int64)


def edge_array(edge_index: Any, num_nodes: int) -> np.ndarray:
    """
    Edges as an array, checked.

    Args:
        edge_index (array-like of shape `(2, E)`): edges.
        num_nodes (`int`): nodes of the graph.

    Returns:
        `np.ndarray` of shape `(2, E)`, int64.

    Raises:
        ValueError: for edges of another shape or between nodes that there are not.
    """
    try:
        edges = np.asarray(edge_index)
    except ValueError as error:  # rows of different lengths
        raise ValueError("`edge_index` must have shape (2, edges), got rows of different lengths.") from error
    if edges.ndim != 2 or len(edges) != 2 or (edges.size and edges.dtype.kind not in "iu"):
        raise ValueError(
            f"`edge_index` must hold whole numbers of shape (2, edges), got {edges.dtype} of shape {edges.shape}."
        )
    edges = edges.astype(np.int64)
    if edges.size and not 0 <= edges.min() <= edges.max() < num_nodes:
        raise ValueError(
            f"`edge_index` must name nodes from 0 to {num_nodes - 1}, got {edges.min()} to {edges.max()}."
        )
    return edges


def degree_features(edge_index: Any, num_nodes: int) -> np.ndarray:
    """
    What describes the nodes of a graph without features: the number of their edges, one-hot.

    Args:
        edge_index (array-like of shape `(2, E)`): edges, in both directions.
        num_nodes (`int`): nodes of the graph.

    Returns:
        `np.ndarray` of shape `(n, 64)`, float32; degrees from 63 on share the last column.
    """
    degrees = np.bincount(edge_array(edge_index, num_nodes)[1], minlength=num_nodes)
    return one_hot(np.minimum(degrees, MOST_DEGREES - 1), MOST_DEGREES)


# ---- many graphs in one npz ------------------------------------------------------------------------------------


def load_tu(path: str | Path) -> "tuple[datasets.Dataset, np.ndarray | None]":
    """
    A set for graph classification in one npz file: `y` (G,), `graph_id` (n,) ascending, `edge_index` (2, E) with nodes
    numbered over the file and every edge in both directions, `node_label` (n,) and perhaps `node_attr` (n, F),
    `edge_label` (E,) and `test_fold` (G,).

    A node's features are its label, one-hot, and its attributes. Where these are the same for all nodes, it is its
    degree.

    Args:
        path (`str` or `Path`): the file.

    Returns:
        The graphs, `datasets.Dataset`, and for each the fold (from 1) in which it is tested, or -1 for none,
        `np.ndarray` of shape `(G,)`; `None` without `test_fold`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no such file.
    """
    values = _read(path)
    missing = [name for name in ("y", "graph_id", "edge_index") if name not in values]
    if missing:
        raise ValueError(
            f"{path} is no set of graphs: it lacks {', '.join(missing)}. Its keys: {', '.join(sorted(values))}."
        )
    labels, owner = np.asarray(values["y"]).astype(np.int64), np.asarray(values["graph_id"]).astype(np.int64)
    count, nodes = len(labels), len(owner)
    sizes = np.bincount(owner, minlength=count) if nodes else np.zeros(count, dtype=np.int64)
    if len(sizes) != count or not (np.diff(owner) >= 0).all() or not sizes.all():
        raise ValueError(f"{path}: `graph_id` must ascend from 0 to {count - 1}, and every graph needs a node.")
    edges = edge_array(values["edge_index"], nodes)
    if (owner[edges[0]] != owner[edges[1]]).any():
        raise ValueError(f"{path}: `edge_index` has edges between nodes of different graphs.")
    order = np.argsort(owner[edges[0]], kind="stable")
    edges = edges[:, order]
    features = _node_features(values, edges, nodes)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    cuts = np.searchsorted(owner[edges[0]], np.arange(count + 1))
    columns: dict[str, list[Any]] = {
        "edge_index": [edges[:, cuts[i] : cuts[i + 1]] - starts[i] for i in range(count)],
        "num_nodes": sizes.tolist(),
        "node_feat": [features[starts[i] : starts[i + 1]] for i in range(count)],
        "y": labels.tolist(),
    }
    if "edge_label" in values:
        kinds = one_hot(values["edge_label"])[order]
        columns["edge_attr"] = [kinds[cuts[i] : cuts[i + 1]] for i in range(count)]
    folds = np.asarray(values["test_fold"]).astype(np.int64) if "test_fold" in values else None
    return _table(columns), folds


def _node_features(values: Mapping[str, np.ndarray], edges: np.ndarray, nodes: int) -> np.ndarray:
    parts = []
    if "node_label" in values:
        parts.append(one_hot(values["node_label"]))
    if "node_attr" in values:
        parts.append(np.asarray(values["node_attr"], dtype=np.float32).reshape(nodes, -1))
    features = np.concatenate(parts, axis=1) if parts else np.zeros((nodes, 0), dtype=np.float32)
    if features.shape[1] == 0 or (features == features[:1]).all():
        return degree_features(edges, nodes)
    return features


def _table(columns: dict[str, list[Any]]) -> "datasets.Dataset":
    """Arrays of one graph each as a table, without a detour over lists of numbers."""
    library = datasets_library("'ebt-transformers[train]'")
    kinds = {"edge_index": "int64", "node_feat": "float32", "edge_attr": "float32"}
    features = {
        name: library.List(library.List(library.Value(kinds[name]))) if name in kinds else library.Value("int64")
        for name in columns
    }
    rows = {name: [list(each) for each in values] if name in kinds else values for name, values in columns.items()}
    return library.Dataset.from_dict(rows, features=library.Features(features))


# ---- one graph in one npz --------------------------------------------------------------------------------------


def load_anomaly(path: str | Path) -> dict[str, Any]:
    """
    One graph whose nodes have labels, in one npz file: features `x`, `node_features` or `prior` (n, F), labels `y` or
    `node_labels` (n,), and edges `edge_index` (2, E) or `edges` (E, 2). Several kinds of edges are
    `edge_index_<relation>` (2, E) each. Directions are given up: every edge is there both ways, and none leads from a
    node to itself.

    Args:
        path (`str` or `Path`): the file.

    Returns:
        `dict`: a row of arrays, with `y` (n,); of several relations also `edge_type` (E,) and their names,
        `relations`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no such file.
    """
    values = _read(path)
    features, labels = _first(values, FEATURE_KEYS, path), _first(values, LABEL_KEYS, path)
    if features.ndim != 2 or labels.ndim != 1 or len(features) != len(labels):
        raise ValueError(
            f"{path}: features must be (nodes, features) and labels (nodes,), got {features.shape}, {labels.shape}."
        )
    nodes = len(labels)
    row: dict[str, Any] = {
        "num_nodes": nodes,
        "node_feat": features.astype(np.float32),
        "y": labels.astype(np.int64),
    }
    relations = sorted(name for name in values if name.startswith(RELATION_PREFIX))
    if not relations:
        edges = _first(values, EDGE_KEYS, path)
        edges = edges.T if edges.ndim == 2 and edges.shape[0] != 2 and edges.shape[1] == 2 else edges
        return {"edge_index": undirected(edges, nodes), **row}
    return {**_join([undirected(values[name], nodes) for name in relations]), **row} | {
        "relations": [name.removeprefix(RELATION_PREFIX) for name in relations]
    }


def _join(kinds: Sequence[np.ndarray]) -> dict[str, Any]:
    types = np.concatenate([np.full(edges.shape[1], kind) for kind, edges in enumerate(kinds)])
    return {"edge_index": np.concatenate(kinds, axis=1), "edge_type": types.astype(np.int64)}


def merge_relations(row: Mapping[str, Any]) -> dict[str, Any]:
    """
    A graph whose kinds of edges are forgotten: two nodes have an edge if they had one of any kind.

    Args:
        row (mapping): a graph, perhaps with `edge_type`.

    Returns:
        `dict`: the row without `edge_type` and `relations`, every edge both ways and once.

    Raises:
        ValueError: if edges have features, which would no longer belong to one edge.
    """
    if row.get("edge_attr") is not None:
        raise ValueError("Edges with features (`edge_attr`) cannot be merged. Leave the column out.")
    kept = {name: value for name, value in row.items() if name not in ("edge_type", "relations")}
    return {**kept, "edge_index": undirected(row["edge_index"], int(row["num_nodes"]))}


def _read(path: str | Path) -> dict[str, np.ndarray]:
    import zipfile

    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}. Check the path.")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no npz file of plain arrays: {error}") from error


def _first(values: Mapping[str, np.ndarray], names: Sequence[str], path: str | Path) -> np.ndarray:
    for name in names:
        if name in values:
            return values[name]
    raise ValueError(f"{path} has none of the keys {', '.join(names)}. Its keys: {', '.join(sorted(values))}.")


__all__ = [
    "UNKNOWN",
    "degree_features",
    "edge_array",
    "load_anomaly",
    "load_tu",
    "merge_relations",
    "one_hot",
    "undirected",
]
