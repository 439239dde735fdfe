"""The images of a benchmark, the noise every method gets, and what comes out judged."""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import evaluate
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ebt_transformers.configuration.noise_ebt import noise_scheduler
from ebt_transformers.metrics import metric_path
from ebt_transformers.training.images import image_array, load_image_files, select_images


ORDER_SEED = 0


@dataclass
class Pictures:
    """
    Images of one size.

    Args:
        pixels (`torch.ByteTensor` of shape `(N, C, H, W)`): the images.
        labels (`np.ndarray` of shape `(N,)`, *optional*): their classes, where the data has them.
    """

    pixels: Tensor
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, rows: slice) -> "Pictures":
        return Pictures(self.pixels[rows], None if self.labels is None else self.labels[rows])

    @property
    def scaled(self) -> Tensor:
        """The images in -1..1."""
        return self.pixels.float() / 127.5 - 1

    @property
    def fingerprint(self) -> str:
        """Tells these pixels from others."""
        return hashlib.sha256(str(tuple(self.pixels.shape)).encode() + self.pixels.numpy().tobytes()).hexdigest()[:16]


def _crops(array: np.ndarray, size: tuple[int, int], how: str) -> Iterator[np.ndarray]:
    """Crops (C, H, W) of an image: the one in the middle, or as many as fit side by side."""
    height, width = size
    rows, columns = array.shape[1] // height, array.shape[2] // width
    if how == "centre":
        rows = columns = 1
    top, left = (array.shape[1] - rows * height) // 2, (array.shape[2] - columns * width) // 2
    for row in range(rows):
        for column in range(columns):
            down, right = top + row * height, left + column * width
            yield array[:, down : down + height, right : right + width]


def load_pictures(
    path: str,
    size: tuple[int, int],
    channels: int,
    crops: str = "centre",
    resize_to: int | None = None,
    limit: int | None = None,
) -> Pictures:
    """
    Images from a file or folder, in a random order that is always the same: some files are sorted by class, and tiles
    of one image are alike.

    Args:
        path (`str`): a parquet file, an image file, a pattern or a folder of images.
        size (`tuple[int, int]`): height and width of the crops.
        channels (`int`): 1 for grey, 3 for RGB; images are converted.
        crops (`str`, *optional*, defaults to `"centre"`): one from the middle of each image, or `"tiles"`.
        resize_to (`int`, *optional*): resize the shorter side to this before cropping.
        limit (`int`, *optional*): so many crops at most.

    Raises:
        FileNotFoundError: for a path behind which there is nothing.
        ValueError: for an image smaller than a crop.
    """
    (table,) = load_image_files({"data": [path]}).values()
    classes = np.asarray(table["label"]) if "label" in table.column_names else None
    found: list[np.ndarray] = []
    labels: list[int] = []
    images = select_images(table)
    random = np.random.default_rng(ORDER_SEED)
    chosen = random.permutation(len(images)).tolist()
    if crops == "centre":
        chosen = chosen[:limit]
    for number in tqdm(chosen, desc="loading images", leave=False):
        picture = images[number]["image"]
        encoded = picture["bytes"]
        with Image.open(picture["path"] if encoded is None else io.BytesIO(encoded)) as image:
            if resize_to is None and (image.height < size[0] or image.width < size[1]):
                raise ValueError(
                    f"Image {number} of {Path(path).name} has {image.height} x {image.width} pixels, less than a crop "
                    f"of {size[0]} x {size[1]}. Choose a smaller --image-size, or enlarge with --resize-to."
                )
            array = image_array(image, channels, size, resize_to or 0)
        cut = list(_crops(array, size, crops))
        found += cut
        labels += [] if classes is None else [int(classes[number])] * len(cut)
    order = random.permutation(len(found))[:limit] if crops == "tiles" else np.arange(len(found))
    pixels = torch.from_numpy(np.stack([found[place] for place in order]))
    return Pictures(pixels, None if classes is None else np.array(labels)[order])


@dataclass(frozen=True)
class Noise:
    """
    Noise of a level: images become `keep * image + std * noise`, on -1..1.

    Args:
        level (`float`): share of the way to pure noise, as in `noise_scheduler`.
    """

    level: float

    @property
    def remaining(self) -> float:
        """Share of the image's variance that is left [alpha bar]."""
        scheduler, timestep = noise_scheduler(self.level)
        return float(scheduler.alphas_cumprod[timestep])

    @property
    def keep(self) -> float:
        """What the image is multiplied by."""
        return self.remaining**0.5

    @property
    def std(self) -> float:
        """Standard deviation of what is added to it."""
        return (1 - self.remaining) ** 0.5

    def add(self, clean: Tensor, seed: int) -> Tensor:
        """
        Noisy images; an image's noise depends on the seed and on its place alone.

        Args:
            clean (`Tensor` of shape `(N, C, H, W)`): images in -1..1.
            seed (`int`): of the noise.
        """
        scheduler, timestep = noise_scheduler(self.level)
        generator = torch.Generator().manual_seed(seed)
        # one by one: a longer draw would give its first images other noise
        noise = torch.stack([torch.randn(clean.shape[1:], generator=generator) for _ in clean])
        return scheduler.add_noise(clean, noise, torch.full((len(clean),), timestep))


def to_unit(images: Tensor) -> np.ndarray:
    """Images (B, C, H, W) in -1..1 as (B, H, W, C), or (B, H, W) if grey, in 0..1, not clipped."""
    arrays = ((images.double() + 1) / 2).permute(0, 2, 3, 1).cpu().numpy()
    return arrays[..., 0] if arrays.shape[-1] == 1 else arrays


def from_unit(arrays: np.ndarray) -> Tensor:
    """The way back."""
    images = torch.from_numpy(np.ascontiguousarray(arrays)).float() * 2 - 1
    return images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)


class Judge:
    """PSNR and SSIM of images, clipped to the range of pixels but not rounded, as in the official evaluation."""

    def __init__(self) -> None:
        self.metrics = {name: evaluate.load(metric_path(name), keep_in_memory=True) for name in ("psnr", "ssim")}

    def __call__(self, reconstruction: Tensor, clean: Tensor) -> dict[str, list[float]]:
        """
        Args:
            reconstruction, clean (`Tensor` of shape `(B, C, H, W)`): images in -1..1.

        Returns:
            `dict` of `"psnr"` and `"ssim"`, a value for every image.
        """
        pair = {"predictions": to_unit(reconstruction.clamp(-1, 1)) * 255, "references": to_unit(clean) * 255}
        return {
            name: metric.compute(**pair, data_range=255, reduction="none")[name]
            for name, metric in self.metrics.items()
        }


__all__ = ["Judge", "Noise", "Pictures", "from_unit", "load_pictures", "to_unit"]
