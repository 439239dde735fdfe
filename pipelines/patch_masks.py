"""Which patches of a picture are to be found: drawn at random, or from a mask that a user drew."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.image_utils import is_pil_image

from ..modeling_ebt.image_processing_ebt import EBTImageProcessor


BOX = 4  # PIL.Image.Resampling.BOX: no pixel of a mask is lost, and none is invented
TOUCHED = 1e-6  # share of a pixel
HALF = 0.5


def random_patches(count: int, share: float, seed: int) -> Tensor:
    """
    Random patches, the same on every device.

    Args:
        count (`int`): patches there are [N].
        share (`float`): how many of them are drawn, above 0 and at most 1; one at least is.
        seed (`int`): of the randomness.

    Returns:
        `torch.BoolTensor` of shape `(N,)`: True for those drawn.
    """
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: max(1, round(share * count))]
    return torch.zeros(count, dtype=torch.bool).index_fill(0, drawn, True)


def given_patches(mask: Any, picture: Any, processor: EBTImageProcessor, grid: tuple[int, int]) -> Tensor:
    """
    The patches that a user's mask means.

    Args:
        mask (PIL image, file, URL, array or tensor): of the picture's height and width in pixels, and then every patch
            that it touches counts; or of the grid of patches, as `(rows, columns)` or in one row. Bright pixels are
            masked: above half of 255 in pictures and in integers that go beyond 1, above 0.5 otherwise.
        picture (PIL image, array or tensor): what it belongs to.
        processor ([`EBTImageProcessor`]): of the picture; a mask in pixels is resized and cut in the same way.
        grid (`tuple[int, int]`): rows and columns of patches of the prepared picture.

    Returns:
        `torch.BoolTensor` of shape `(N,)`.

    Raises:
        ValueError: for a mask of another size, or one that masks nothing.
    """
    chosen = _as_bool(mask, processor)
    height, width = _size(picture, processor)
    flat = (grid[0] * grid[1],)
    if chosen.shape in (grid, flat) and (chosen.shape != (height, width) or _of_bool(mask)):
        patches = torch.from_numpy(chosen).flatten()
    elif chosen.shape == (height, width):
        patches = _touched(chosen, processor, grid)
    else:
        raise ValueError(
            f"A mask must have the picture's size, {height} x {width} pixels, or be a grid of {grid[0]} x {grid[1]} "
            f"patches, got the shape {chosen.shape}."
        )
    if not bool(patches.any()):
        raise ValueError(
            "The mask masks nothing of what the model sees: no value of it is bright, or only where the picture is "
            "cut off. Mask at least one patch."
        )
    return patches


def _of_bool(mask: Any) -> bool:
    return str(getattr(mask, "dtype", "")).removeprefix("torch.") == "bool"


def _as_bool(mask: Any, processor: EBTImageProcessor) -> np.ndarray:
    """A mask of any kind as booleans, without axes of length 1 beside height and width."""
    mask = processor.fetch_images(mask)
    if is_pil_image(mask):
        return np.asarray(mask.convert("L")) > HALF * 255
    if not isinstance(mask, (np.ndarray, Tensor)):
        raise ValueError(
            f"A mask must be a PIL image, a file, an address, an array or a tensor, got {type(mask).__name__}."
        )
    array = mask.detach().cpu().float().numpy() if isinstance(mask, Tensor) else mask
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[-1]):
        array = array[0] if array.shape[0] == 1 else array[..., 0]
    whole = _of_bool(mask) or "int" in str(mask.dtype)
    largest = 255 if whole and array.size and array.max() > 1 else 1
    return array > HALF * largest


def _size(picture: Any, processor: EBTImageProcessor) -> tuple[int, int]:
    """Height and width of a picture before it is prepared; the processor knows which axes these are."""
    as_it_is = {"do_resize": False, "do_center_crop": False, "do_normalize": False, "do_pad": True}
    height, width = processor(picture, **as_it_is)["original_sizes"][0]
    return int(height), int(width)


def _touched(chosen: np.ndarray, processor: EBTImageProcessor, grid: tuple[int, int]) -> Tensor:
    """The patches that some masked pixel falls into."""
    options = {"num_channels": 1, "do_normalize": False, "do_rescale": True, "resample": BOX}
    pixels = processor(chosen.astype(np.float32), **options, return_tensors="pt")["pixel_values"]
    rows, columns = grid
    if pixels.shape[-2] % rows or pixels.shape[-1] % columns:
        raise ValueError(
            f"The image processor makes {pixels.shape[-2]} x {pixels.shape[-1]} pixels of the mask, which {rows} x "
            f"{columns} patches do not divide. Use the model's own processor."
        )
    return (torch.nn.functional.adaptive_max_pool2d(pixels, grid) > TOUCHED).flatten()


__all__ = ["given_patches", "random_patches"]
