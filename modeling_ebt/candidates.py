"""
What a candidate is: a distribution over a vocabulary for text, the image itself for images.

All V-sized arithmetic of the text descent lives here.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


FEW_ROWS = 8  # more of them are as fast the usual way round
FEWER_ROWS = 3  # the same for mixtures of a table
BAGS = 16


def _subtract_few(base: Tensor, rows: Tensor, table: Tensor) -> Tensor:
    """
    `base - rows @ table^T` for a handful of rows (n, D), as while decoding. Processors are slow where the short side
    of the product comes first, or is a single row: two rows, with the table in front, take half the time of one.
    """
    pair = rows.repeat(2, 1) if len(rows) == 1 else rows
    return base - (table @ pair.t()).t()[: len(rows)]


def _mix_few(rows: Tensor, table: Tensor) -> Tensor:
    """
    `rows @ table` for one to three rows (n, V). A matrix product does this on one thread; as bags of embeddings, a few
    for each row, it reads the table as fast as memory gives it.
    """
    count, vocab = rows.shape
    starts = torch.arange(0, vocab, -(-vocab // BAGS), device=rows.device)
    offsets = (torch.arange(count, device=rows.device)[:, None] * vocab + starts).flatten()
    tokens = torch.arange(vocab, device=rows.device).repeat(count)
    bags = F.embedding_bag(tokens, table, offsets, mode="sum", per_sample_weights=rows.flatten())
    return bags.view(count, len(starts), -1).sum(1)


def kl_divergence(new: Tensor, old: Tensor) -> Tensor:
    """KL(new || old) in nats of the distributions that logits (..., V) stand for, (...); at least 0."""
    new, old = new.float().log_softmax(-1), old.float().log_softmax(-1)
    return F.kl_div(old, new, reduction="none", log_target=True).sum(-1).clamp(min=0)


class TextCandidates:
    """
    Candidates for the next token, as logits over the vocabulary.

    ``B`` rows, ``N`` candidates a row, ``V`` vocabulary, ``D`` width. The energy is a function of the embedded
    candidate `c = p W` only, so its gradient with respect to the distribution is `(dE/dc) W^T`: autograd runs through
    the transformer (D-sized), never through anything V-sized.

    Args:
        table (`Tensor` of shape `(V, D)`): candidate embedding [W].
        update_rule (`str`): `"replace"` or `"residual"`, see [`EBTConfig`].
        first (`Tensor` that broadcasts to `(B, N, D)`, *optional*): what the candidates embed to at the start of the
            descent, where that is known.
    """

    def __init__(self, table: Tensor, update_rule: str = "replace", first: Tensor | None = None) -> None:
        self.table = table
        self.update_rule = update_rule
        self.first = first

    def point(self, state: Tensor) -> Tensor:
        """Logits (B, N, V) -> distribution (B, N, V), in float32."""
        return torch.softmax(state.float(), dim=-1)

    def embed(self, point: Tensor) -> Tensor:
        """Distribution (B, N, V) -> embedded candidate (B, N, D)."""
        if self.first is not None:
            first, self.first = self.first, None
            return first.expand(*point.shape[:-1], -1)
        rows, device = point.flatten(0, -2), point.device.type
        plain = self.table.dtype == point.dtype == torch.float32 and not torch.is_autocast_enabled(device)
        constant = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        if device == "cpu" and plain and constant and 0 < len(rows) <= FEWER_ROWS:
            return _mix_few(rows, self.table).view(*point.shape[:-1], -1)
        return point.to(self.table.dtype) @ self.table

    def update(self, state: Tensor, point: Tensor, gradient: Tensor, step_size: Tensor | float) -> Tensor:
        """One step along `gradient` (B, N, D); returns logits (B, N, V) in float32."""
        # scaling the D-sized gradient instead of the V-sized product leaves nothing V-sized for the backward pass
        scaled = step_size * gradient.float()
        base = point if self.update_rule == "replace" else state
        # where the gradient is a constant, so is its projection: the table learns in differentiated steps only
        table = self.table if gradient.requires_grad else self.table.detach()
        if table.dtype == torch.float32 and not torch.is_autocast_enabled(base.device.type):
            base_rows, rows = base.flatten(0, -2), scaled.flatten(0, -2)
            if base.device.type == "cpu" and len(rows) <= FEW_ROWS:
                return _subtract_few(base_rows, rows, table).view(base.shape)
            # one pass over the V-sized result instead of two
            return torch.addmm(base_rows, rows, table.t(), alpha=-1).view(base.shape)
        return base - F.linear(scaled.to(table.dtype), table).float()


class ImageCandidates:
    """
    Candidates for a clean image, as the image itself: one step is `x' = x - alpha dE/dx`.

    ``B`` rows, ``M`` candidates a row; images are (B, M, C, H, W).

    Args:
        dtype (`torch.dtype`): what the energy is computed in; states stay in float32.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype

    def point(self, state: Tensor) -> Tensor:
        """The image (B, M, C, H, W) is its own candidate."""
        return state

    def embed(self, point: Tensor) -> Tensor:
        """The image (B, M, C, H, W) in the precision of the energy."""
        return point.to(self.dtype)

    def update(self, state: Tensor, point: Tensor, gradient: Tensor, step_size: Tensor | float) -> Tensor:
        """One step along `gradient` (B, M, C, H, W), in float32."""
        return state - step_size * gradient.float()


__all__ = ["ImageCandidates", "TextCandidates", "kl_divergence"]
