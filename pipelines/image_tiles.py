"""Large pictures in overlapping tiles of the size a model was trained on, blended smoothly."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Tiling:
    """
    How pictures larger than a tile are cut, in the cells a model works on (pixels, or latents).

    Args:
        size (`tuple[int, int]`): height and width of a tile.
        overlap (`tuple[int, int]`): by how much neighbours share rows and columns, at least.
    """

    size: tuple[int, int]
    overlap: tuple[int, int]

    @classmethod
    def from_options(
        cls,
        tile_size: int | Sequence[int] | str | None,
        tile_overlap: int | None,
        model_size: tuple[int, int],
        patch_size: int,
        unit: int = 1,
    ) -> "Tiling | None":
        """
        The tiling of a call's options.

        Args:
            tile_size (`int`, `(int, int)`, `"auto"` or `None`): in pixels; `"auto"` is `model_size`, `None` no tiling.
            tile_overlap (`int`, *optional*): in pixels; a quarter of the tile by default.
            model_size (`tuple[int, int]`): height and width the model was made for, in cells.
            patch_size (`int`): of the model, in cells.
            unit (`int`, *optional*, defaults to 1): pixels a side for each cell.

        Raises:
            ValueError: for a size that is no positive multiple of the patch, an overlap out of range, and an overlap
                of no tiles.
        """
        if tile_size is None:
            if tile_overlap is not None:
                raise ValueError(f"`tile_overlap={tile_overlap}` has no meaning with `tile_size=None` (no tiles).")
            return None
        multiple = patch_size * unit
        sides: list[Any] = [side * unit for side in model_size]
        if tile_size != "auto":
            sides = list(tile_size) if isinstance(tile_size, (list, tuple)) else [tile_size, tile_size]
            if len(sides) != 2 or not all(_is_integer(side) and side > 0 and side % multiple == 0 for side in sides):
                raise ValueError(
                    f"`tile_size` must be one number or (height, width), positive multiples of {multiple} (the patch "
                    f"size in pixels), 'auto' for the model's own size or None for no tiles, got {tile_size!r}."
                )
        if tile_overlap is None:
            return cls((sides[0] // unit, sides[1] // unit), (sides[0] // unit // 4, sides[1] // unit // 4))
        if not _is_integer(tile_overlap) or not 0 <= tile_overlap < min(sides) or tile_overlap % unit:
            step = f", a multiple of {unit}" if unit > 1 else ""
            raise ValueError(
                f"`tile_overlap` must be at least 0 and below the tile's side of {min(sides)} pixels{step}, got "
                f"{tile_overlap!r}."
            )
        return cls((sides[0] // unit, sides[1] // unit), (tile_overlap // unit, tile_overlap // unit))

    def places(self, height: int, width: int) -> list[tuple[int, int, int, int]]:
        """Top, left, height and width of every tile of a picture; one tile where it is no larger than that."""
        rows, columns = (
            _starts(length, tile, overlap)
            for length, tile, overlap in zip((height, width), self.size, self.overlap, strict=True)
        )
        tile_height, tile_width = min(height, self.size[0]), min(width, self.size[1])
        return [(top, left, tile_height, tile_width) for top in rows for left in columns]


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin, spread evenly, so that neighbours share at least `overlap`."""
    if length <= tile:
        return [0]
    count = math.ceil((length - tile) / (tile - overlap)) + 1
    return [round(index * (length - tile) / (count - 1)) for index in range(count)]


class Canvas:
    """
    A picture put together from tiles: a weighted mean, with weights that fall off towards a tile's edges.

    Args:
        shape (`Sequence[int]`): of the whole, `(..., height, width)`.
        overlap (`tuple[int, int]`): over how many rows and columns the weights fall off.
    """

    def __init__(self, shape: Sequence[int], overlap: tuple[int, int]) -> None:
        self.sum = torch.zeros(tuple(shape))
        self.weight = torch.zeros(tuple(shape[-2:]))
        self.overlap = overlap

    def add(self, tile: Tensor, top: int, left: int) -> None:
        """Puts down one tile `(..., height, width)`."""
        height, width = tile.shape[-2:]
        rows, columns = (_ramp(side, over) for side, over in zip((height, width), self.overlap, strict=True))
        weight = rows[:, None] * columns
        self.sum[..., top : top + height, left : left + width] += tile * weight
        self.weight[top : top + height, left : left + width] += weight

    def picture(self) -> Tensor:
        """The whole, once every place is covered."""
        return self.sum / self.weight


def _ramp(side: int, overlap: int) -> Tensor:
    """Weights of a tile's rows: rising over the overlap from above 0 to 1, and falling again."""
    position = torch.arange(side)
    distance = torch.minimum(position, side - 1 - position) + 1
    return distance.clamp(max=overlap + 1) / (overlap + 1)


__all__ = ["Canvas", "Tiling"]
