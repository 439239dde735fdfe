"""
Where a node is in its graph: eigenvectors of the graph's Laplacian.

Shapes: ``n`` nodes, ``E`` edges, ``k`` positions.
"""

from typing import Any

import numpy as np
import torch

from .graph_loading import undirected


DENSE_NODES = 1000  # up to which all eigenvectors are computed; beyond, only those asked for


def laplacian_positions(edge_index: Any, num_nodes: int, k: int) -> np.ndarray:
    """
    The first `k` eigenvectors of the normalised Laplacian `I - D^-1/2 A D^-1/2` whose eigenvalue is above 0.
    Directions, repeated edges and self-loops do not count. Every connected part of a graph has eigenvectors of its
    own, so that no node's positions depend on what else is in the graph or the batch.

    An eigenvector is as good as its negative, and for equal eigenvalues as any mixture of theirs: models flip signs in
    training.

    Args:
        edge_index (array-like of shape `(2, E)`): edges.
        num_nodes (`int`): nodes of the graph.
        k (`int`): how many, at least 1.

    Returns:
        `np.ndarray` of shape `(n, k)`, float32; parts with `k` nodes or fewer have zeros in the columns that are left.

    Raises:
        ValueError: for `k` below 1, and edges of another shape or between nodes that there are not.
        ImportError: if scipy is missing, for parts of more than 1,000 nodes.

    Example:

    ```python
    >>> from ebt_transformers.training.graph_data import laplacian_positions

    >>> laplacian_positions([[0, 1], [1, 2]], num_nodes=4, k=3).shape
    (4, 3)
    ```
    """
    if k < 1:
        raise ValueError(f"`k` must be at least 1, got {k}.")
    edges = undirected(edge_index, num_nodes)
    positions = np.zeros((num_nodes, k), dtype=np.float32)
    if edges.shape[1] == 0:
        return positions
    owner = _parts(edges, num_nodes)
    order = np.argsort(owner, kind="stable")
    place = np.empty(num_nodes, dtype=np.int64)  # of a node in its part
    firsts, sizes = np.unique(owner[order], return_index=True, return_counts=True)[1:]
    place[order] = np.arange(num_nodes) - np.repeat(firsts, sizes)
    edge_owner = owner[edges[0]]
    by_owner = np.argsort(edge_owner, kind="stable")
    edges, edge_owner = edges[:, by_owner], edge_owner[by_owner]
    for first, size in zip(firsts, sizes, strict=True):
        if size == 1:
            continue
        nodes = order[first : first + size]
        begin, end = np.searchsorted(edge_owner, [owner[nodes[0]], owner[nodes[0]] + 1])
        vectors = _eigenvectors(place[edges[:, begin:end]], int(size), min(k, int(size) - 1))
        positions[nodes, : vectors.shape[1]] = vectors
    return positions


def _parts(edges: np.ndarray, num_nodes: int) -> np.ndarray:
    """For each node the smallest node it is connected with."""
    owner = np.arange(num_nodes)
    while True:
        smaller = owner.copy()
        np.minimum.at(smaller, edges[0], owner[edges[1]])
        smaller = smaller[smaller]
        if np.array_equal(smaller, owner):
            return owner
        owner = smaller


def _eigenvectors(edges: np.ndarray, size: int, k: int) -> np.ndarray:
    """Of a connected graph, those behind the first."""
    scale = 1.0 / np.sqrt(np.bincount(edges[0], minlength=size))
    weights = scale[edges[0]] * scale[edges[1]]
    if size <= DENSE_NODES:
        laplacian = np.eye(size)
        laplacian[edges[0], edges[1]] = -weights
        vectors = torch.linalg.eigh(torch.from_numpy(laplacian))[1].numpy()
        return vectors[:, 1 : k + 1]
    try:
        from scipy.sparse import coo_array
        from scipy.sparse.linalg import eigsh
    except ImportError as error:
        raise ImportError(
            f"Positions in a graph of {size:,} connected nodes need scipy: pip install 'ebt-transformers[evaluate]'."
        ) from error
    # the largest eigenvalues of D^-1/2 A D^-1/2 are the smallest of the Laplacian, and found sooner; a fixed start
    # makes the result the same every time
    adjacency = coo_array((weights, (edges[0], edges[1])), shape=(size, size)).tocsr()
    start = np.random.default_rng(0).standard_normal(size)
    values, vectors = eigsh(adjacency, k=min(k + 1, size - 1), which="LA", v0=start)
    return vectors[:, np.argsort(-values)][:, 1 : k + 1]


def add_positions(dataset: Any, k: int) -> Any:
    """
    Graphs with their positions, computed once instead of for every batch.

    Args:
        dataset (`datasets.Dataset` or list of rows): graphs with `edge_index` and `num_nodes`.
        k (`int`): how many, at least 1.

    Returns:
        The same kind, with a column `positions` (n, k).
    """

    def positions(row: Any) -> dict[str, Any]:
        return {"positions": laplacian_positions(row["edge_index"], int(row["num_nodes"]), k)}

    if hasattr(dataset, "map"):
        return dataset.map(positions)
    return [{**row, **positions(row)} for row in dataset]


__all__ = ["add_positions", "laplacian_positions"]
