"""
What `ebt train complete` makes of images: their scale, and which patches of each are to be found.

Like everything random about an image, its mask is a function of the seed, the epoch and the image's number alone: a
run is the same however it is batched, split over processes and workers, or interrupted.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..configuration import EnergyTransformerConfig
from ..modeling_et.completion_et import draw_masks
from .images import ImageItem
from .mae_twin import noise_of


# 0..1 to the model's scale; "symmetric" is -1..1, as for all other models of this package
NORMALIZATIONS: dict[str, dict[str, Any]] = {
    "symmetric": {"image_mean": 0.5, "image_std": 0.5},
    "imagenet": {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
}
_MASKS = 3  # crops, flips and noise have streams of randomness of their own


def mask_generator(key: tuple[int, int, int]) -> torch.Generator:
    """
    Randomness of one image's mask in one epoch.

    Args:
        key (`tuple[int, int, int]`): seed, epoch and number, as in [`ImageItem`].
    """
    state = np.random.SeedSequence([*key, _MASKS]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


class PixelScale:
    """
    From pixels to a model's scale and back.

    Args:
        image_mean, image_std (`float` or `list[float]`, *optional*, default to 0.5): as in [`EBTImageProcessor`]: what
            brings 0..1 to the model's scale; one number, or one for each channel.
    """

    def __init__(self, image_mean: Any = 0.5, image_std: Any = 0.5) -> None:
        self.mean, self.std = (
            torch.as_tensor(value, dtype=torch.float32).reshape(-1, 1, 1) for value in (image_mean, image_std)
        )

    def from_symmetric(self, images: Tensor) -> Tensor:
        """Images `(..., C, H, W)` in -1..1 to the model's scale; those of the defaults stay as they are, exactly."""
        if bool((self.mean == 0.5).all()) and bool((self.std == 0.5).all()):
            return images
        return ((images + 1) / 2 - self.mean) / self.std

    def to_bytes(self, images: Tensor) -> Tensor:
        """Images on the model's scale to 0..255, not rounded; what lies outside is cut off."""
        return (images.float() * self.std.to(images.device) + self.mean.to(images.device)).clamp(0, 1) * 255


class MaskCollator:
    """
    Images to a batch for [`EnergyTransformerForImageCompletion`]: `pixel_values`, `bool_masked_pos` and `scored_pos`,
    drawn as the model's `draw_masks` does. Evaluation images have the same masks every time.

    Args:
        config ([`EnergyTransformerConfig`]): gives patches, and the shares that count and stay visible.
        scale ([`PixelScale`], *optional*): that of the model; -1..1 by default.
        twin (`bool`, *optional*, defaults to `False`): a batch for the MAE twin instead: `pixel_values` and `noise`,
            which masks all patches that count.

    Example:

    ```python
    >>> import torch
    >>> from ebt_transformers import EnergyTransformerConfig
    >>> from ebt_transformers.training.complete_data import MaskCollator
    >>> from ebt_transformers.training.images import ImageItem

    >>> collator = MaskCollator(EnergyTransformerConfig.for_images(image_size=16, patch_size=4))
    >>> batch = collator([ImageItem(torch.zeros(3, 16, 16), (0, 0, number)) for number in range(2)])
    >>> batch["bool_masked_pos"].sum(1).tolist(), batch["scored_pos"].sum(1).tolist()
    ([7, 7], [8, 8])
    ```
    """

    def __init__(self, config: EnergyTransformerConfig, scale: PixelScale | None = None, twin: bool = False) -> None:
        self.config = config
        self.scale = PixelScale() if scale is None else scale
        self.twin = twin

    def __call__(self, items: Sequence[ImageItem]) -> dict[str, Tensor]:
        pixels = self.scale.from_symmetric(torch.stack([item.pixels for item in items]))
        drawn = [draw_masks(self.config, 1, mask_generator(item.key)) for item in items]
        masked, scored = (torch.cat(masks) for masks in zip(*drawn, strict=True))
        if self.twin:
            return {"pixel_values": pixels, "noise": noise_of(scored)}
        return {"pixel_values": pixels, "bool_masked_pos": masked, "scored_pos": scored}


__all__ = ["NORMALIZATIONS", "MaskCollator", "PixelScale", "mask_generator"]
