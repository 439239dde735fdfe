"""Ways to fill masked patches without a model, and how any completion is judged. Not a script.

Shapes: ``B`` images, ``C`` channels, ``H x W`` pixels, ``N`` patches.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import interpolate, ndimage
from skimage import restoration
from torch import Tensor


# what completes images (B, C, H, W) with masks of patches (B, N); what it returns for visible patches does not matter
Completer = Callable[[Tensor, Tensor], Tensor]

RANGE = 2.0  # of pixels, -1..1


def pixel_mask(mask: Tensor, size: tuple[int, int], patch: int) -> Tensor:
    """
    Which pixels are masked.

    Args:
        mask (`torch.BoolTensor` of shape `(B, N)`): True for masked patches.
        size (`tuple[int, int]`): height and width of the images.
        patch (`int`): side of a patch.

    Returns:
        `torch.BoolTensor` of shape `(B, 1, H, W)`.
    """
    grid = mask.view(-1, 1, size[0] // patch, size[1] // patch)
    return grid.repeat_interleave(patch, dim=-1).repeat_interleave(patch, dim=-2)


def merge(images: Tensor, completed: Tensor, hidden: Tensor) -> Tensor:
    """Images with their masked pixels completed, in the range of pixels; the others stay as they are."""
    return torch.where(hidden, completed.clamp(-1, 1), images)


@dataclass(frozen=True)
class Quality:
    """
    How near masked pixels come to the true ones.

    Args:
        mse (`float`): mean squared error, pixels in -1..1.
        share (`float`): the same over the variance of the true ones (around the mean of each channel): 1 for who
            knows nothing but the mean.
        psnr (`float`): in dB, of the masked pixels, mean over images.
        spread (`float`): standard error of `mse` over images.
    """

    mse: float
    share: float
    psnr: float
    spread: float


def judge(completed: Tensor, images: Tensor, hidden: Tensor) -> Quality:
    """
    Args:
        completed, images (`torch.FloatTensor` of shape `(B, C, H, W)`): what a method made, and the truth; -1..1, and
            what lies outside is clamped.
        hidden (`torch.BoolTensor` of shape `(B, 1, H, W)`): the masked pixels, as many in every image.
    """
    channels = images.shape[1]
    counts = hidden.sum((1, 2, 3)) * channels
    errors = ((completed.clamp(-1, 1) - images).square() * hidden).sum((1, 2, 3)) / counts
    means = (images * hidden).sum((0, 2, 3), keepdim=True) / hidden.sum()
    variance = ((images - means).square() * hidden).sum() / counts.sum()
    psnr = 10 * torch.log10(RANGE**2 / errors.clamp(min=1e-10))
    mse = float(errors.mean())
    spread = float(errors.std()) / math.sqrt(len(errors)) if len(errors) > 1 else math.nan
    return Quality(mse, mse / float(variance), float(psnr.mean()), spread)


class Fillings:
    """
    Completions without a model: the mean of the visible pixels of the image, the mean of the training images at the
    same place, the nearest visible pixel, linear interpolation of visible pixels (scipy) and biharmonic inpainting
    (scikit-image).

    Args:
        mean_image (`torch.FloatTensor` of shape `(C, H, W)`): mean of the training images.
        patch (`int`): side of a patch.
    """

    def __init__(self, mean_image: Tensor, patch: int) -> None:
        self.mean_image, self.patch = mean_image, patch

    @property
    def methods(self) -> dict[str, Completer]:
        """By name."""
        return {
            "training mean": lambda images, mask: self.mean_image.expand(images.shape),
            "visible mean": self.visible_mean,
            "nearest": self._one_by_one(_nearest),
            "linear": self._one_by_one(_linear),
            "biharmonic": self._one_by_one(_biharmonic),
        }

    def visible_mean(self, images: Tensor, mask: Tensor) -> Tensor:
        """The mean of the visible pixels of every image and channel, everywhere."""
        seen = ~pixel_mask(mask, (images.shape[2], images.shape[3]), self.patch)
        mean = (images * seen).sum((2, 3), keepdim=True) / seen.sum((2, 3), keepdim=True).clamp(min=1)
        return mean.expand(images.shape)

    def _one_by_one(self, fill: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Completer:
        def complete(images: Tensor, mask: Tensor) -> Tensor:
            hidden = pixel_mask(mask, (images.shape[2], images.shape[3]), self.patch)[:, 0].numpy()
            pairs = zip(images.permute(0, 2, 3, 1).double().numpy(), hidden, strict=True)
            return torch.from_numpy(np.stack([fill(image, each) for image, each in pairs])).permute(0, 3, 1, 2).float()

        return complete


def _nearest(image: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Every hidden pixel of an image (H, W, C) as the nearest visible one."""
    rows, columns = ndimage.distance_transform_edt(hidden, return_distances=False, return_indices=True)
    return image[rows, columns]


def _linear(image: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Hidden pixels on the planes through visible ones; those outside of all of them as the nearest."""
    filled = _nearest(image, hidden)
    found = interpolate.griddata(np.argwhere(~hidden), image[~hidden], np.argwhere(hidden), method="linear")
    filled[hidden] = np.where(np.isfinite(found), found, filled[hidden])
    return filled


def _biharmonic(image: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """The smoothest surface through the visible pixels."""
    return restoration.inpaint_biharmonic(image, hidden, channel_axis=-1)


__all__ = ["Completer", "Fillings", "Quality", "judge", "merge", "pixel_mask"]
