"""What a candidate is: distributions over a vocabulary for text. Where all V-sized arithmetic of the descent lives."""

import torch
from torch import Tensor
from torch.nn import functional as F


class TextCandidates:
    """
    Candidates for the next token, as logits over the vocabulary.

    ``B`` rows, ``N`` candidates a row, ``V`` vocabulary, ``D`` width. The energy is a function of the embedded
    candidate `c = p W` only, so its gradient with respect to the distribution is `(dE/dc) W^T`: autograd runs through
    the transformer (D-sized), never through anything V-sized.

    Args:
        table (`Tensor` of shape `(V, D)`): candidate embedding [W].
        update_rule (`str`): `"replace"` or `"residual"`, see [`EBTConfig`].
    """

    def __init__(self, table: Tensor, update_rule: str = "replace") -> None:
        self.table = table
        self.update_rule = update_rule

    def point(self, state: Tensor) -> Tensor:
        """Logits (B, N, V) -> distribution (B, N, V), in float32."""
        return torch.softmax(state.float(), dim=-1)

    def embed(self, point: Tensor) -> Tensor:
        """Distribution (B, N, V) -> embedded candidate (B, N, D)."""
        return point.to(self.table.dtype) @ self.table

    def update(self, state: Tensor, point: Tensor, gradient: Tensor, step_size: Tensor | float) -> Tensor:
        """One step along `gradient` (B, N, D); returns logits (B, N, V) in float32."""
        # scaling the D-sized gradient instead of the V-sized product leaves nothing V-sized for the backward pass
        scaled = step_size * gradient.float()
        move = F.linear(scaled.to(self.table.dtype), self.table).float()
        return (point if self.update_rule == "replace" else state) - move


__all__ = ["TextCandidates"]
