"""Where a patch is in its image, as sines and cosines (MAE, DiT)."""

import functools

import torch
from torch import Tensor


@functools.lru_cache(maxsize=32)
def _sincos_table(rows: int, columns: int, made_for: tuple[int, int], width: int) -> Tensor:
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width // 4))

    def encode(count: int, trained: int) -> Tensor:
        # a grid of another size covers the same span, as an interpolated table would
        places = torch.arange(count, dtype=torch.float64, device="cpu") * (trained / count)
        angles = places[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    down, across = encode(rows, made_for[0]), encode(columns, made_for[1])
    # the first half of the width tells the column, the second the row, as in DiT
    table = torch.cat([across[None].expand(rows, -1, -1), down[:, None].expand(-1, columns, -1)], dim=-1)
    return table.flatten(0, 1).float()


def sincos_positions(rows: int, columns: int, made_for: tuple[int, int], width: int) -> Tensor:
    """
    Fixed sine-cosine embeddings of a grid of patches, row by row.

    Args:
        rows, columns (`int`): the grid.
        made_for (`tuple[int, int]`): the grid of training; another one is laid over the same span.
        width (`int`): D.

    Returns:
        `Tensor` of shape `(rows * columns, D)`, in float32 on the CPU.
    """
    # a table made in inference mode would be useless outside
    with torch.inference_mode(False):
        return _sincos_table(rows, columns, made_for, width)


__all__ = ["sincos_positions"]
