"""
Products along the edges of a graph, with torch's sparse matrices: memory and time grow with the edges, not the pairs.

Shapes: ``E`` edges, ``N`` tokens, ``Y`` numbers for each. An edge leads from a row (the query) to a column (the key).
"""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


# said once in every process; what may change in it is known to the tests
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")


def check_edge_index(edge_index: Tensor, count: int) -> None:
    """
    Raises for edges that are none.

    Args:
        edge_index (`torch.LongTensor` of shape `(2, E)`): the edges.
        count (`int`): how many tokens there are [N].

    Raises:
        ValueError: for another shape, numbers that are no integers, and tokens that do not exist.
    """
    if edge_index.dim() != 2 or len(edge_index) != 2:
        raise ValueError(f"`edge_index` must have shape (2, edges), got {tuple(edge_index.shape)}.")
    if edge_index.is_floating_point() or edge_index.dtype == torch.bool:
        raise ValueError(f"`edge_index` must hold integers, got {edge_index.dtype}.")
    if edge_index.numel() and not 0 <= int(edge_index.min()) <= int(edge_index.max()) < count:
        raise ValueError(
            f"`edge_index` must name tokens (nodes) from 0 to {count - 1}, got {int(edge_index.min())} to "
            f"{int(edge_index.max())}."
        )


@dataclass(frozen=True)
class SparseLayout:
    """
    Where the entries of a sparse `(N, N)` matrix are (compressed rows).

    Args:
        starts (`torch.Tensor` of shape `(N + 1,)`): where each row's entries begin.
        columns (`torch.Tensor` of shape `(E,)`): column of every entry, row by row.
    """

    starts: Tensor
    columns: Tensor

    @classmethod
    def of(cls, rows: Tensor, columns: Tensor, count: int) -> "SparseLayout":
        """The layout of entries whose rows are in ascending order."""
        starts = torch.zeros(count + 1, dtype=torch.long, device=rows.device)
        torch.cumsum(torch.bincount(rows, minlength=count), 0, out=starts[1:])
        return cls(starts, columns)

    def matrix(self, values: Tensor) -> Tensor:
        """The sparse matrix with these values (E,)."""
        count = len(self.starts) - 1
        return torch.sparse_csr_tensor(self.starts, self.columns, values, (count, count), check_invariants=False)


@dataclass(frozen=True)
class Edges:
    """
    The edges of a graph, sorted by row and, for the transposed matrix, by column.

    Args:
        rows, columns (`torch.LongTensor` of shape `(E,)`): the query and the key of every edge, by ascending row.
        order (`torch.LongTensor` of shape `(E,)`): for every edge as sorted its place in what was given.
        by_row, by_column ([`SparseLayout`]): of the matrix and its transpose.
        turned (`torch.LongTensor` of shape `(E,)`): for every entry of the transpose its place in the matrix.
    """

    rows: Tensor
    columns: Tensor
    order: Tensor
    by_row: SparseLayout
    by_column: SparseLayout
    turned: Tensor

    @classmethod
    def sort(cls, rows: Tensor, columns: Tensor, count: int) -> "Edges":
        """The edges between `count` tokens, given in any order."""
        order = torch.argsort(rows, stable=True)
        rows, columns = rows[order], columns[order]
        turned = torch.argsort(columns, stable=True)
        by_row = SparseLayout.of(rows, columns, count)
        return cls(rows, columns, order, by_row, SparseLayout.of(columns[turned], rows[turned], count), turned)

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """The inner product of every edge's query and key, (N, Y) and (N, Y) -> (E,). Differentiable."""
        return _Scores.apply(queries, keys, self)

    def gather(self, values: Tensor, keys: Tensor) -> Tensor:
        """For every row the sum of its edges' keys times `values` (E,), (N, Y) -> (N, Y). Differentiable."""
        return _Sum.apply(values, keys, self, False)

    def scatter(self, values: Tensor, queries: Tensor) -> Tensor:
        """For every column the sum of its edges' queries times `values` (E,), (N, Y) -> (N, Y). Differentiable."""
        return _Sum.apply(values, queries, self, True)


def _as_they_are(tokens: Tensor) -> torch.autocast:
    """Mixed precision would halve the factors, and sparse products know no half precision."""
    return torch.autocast(tokens.device.type, enabled=False)


class _Scores(torch.autograd.Function):
    """Entries of `queries @ keys.T` where there are edges."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, edges: Edges) -> Tensor:
        ctx.save_for_backward(queries, keys)
        ctx.edges = edges
        if len(edges.rows) > len(queries) * len(keys):  # torch makes no sparse matrix with more entries than places
            return (queries[edges.rows] * keys[edges.columns]).sum(-1)
        empty = edges.by_row.matrix(queries.new_zeros(len(edges.columns)))
        with _as_they_are(queries):
            return torch.sparse.sampled_addmm(empty, queries, keys.T, beta=0.0).values()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        queries, keys = ctx.saved_tensors
        return ctx.edges.gather(grad, keys), ctx.edges.scatter(grad, queries), None


class _Sum(torch.autograd.Function):
    """`matrix @ tokens`, or with its transpose."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, tokens: Tensor, edges: Edges, transposed: bool) -> Tensor:
        ctx.save_for_backward(values, tokens)
        ctx.edges, ctx.transposed = edges, transposed
        matrix = edges.by_column.matrix(values[edges.turned]) if transposed else edges.by_row.matrix(values)
        with _as_they_are(tokens):
            return matrix @ tokens

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        values, tokens = ctx.saved_tensors
        edges = ctx.edges
        if ctx.transposed:
            return edges.scores(tokens, grad), edges.gather(values, grad), None, None
        return edges.scores(grad, tokens), edges.scatter(values, grad), None, None


__all__ = ["Edges", "SparseLayout", "check_edge_index"]
