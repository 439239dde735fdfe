"""
Image data: cut and augment images to one size, and give them noise.

Everything random about an image (crop, flip, noise, timestep) is a function of the seed, the epoch and the image's
number alone. So a run is the same however it is batched, split over processes and workers, or interrupted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..configuration.noise_ebt import SCHEDULE_STEPS, noise_scheduler
from ..modeling_ebt.latents import encode
from .image_loading import (
    decode_image,
    first_images,
    hold_out_images,
    load_image_files,
    load_image_set,
    select_images,
)


if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image as PILImage

PIL_MODES = {1: "L", 3: "RGB"}
MEMORY_BUDGET = 2.0  # GB of decoded images; CIFAR-10 takes 0.15, 100,000 images of 64 x 64 take 1.2
EVALUATION_SEED = 0  # every run sees the evaluation images with the same noise, whatever its own seed
_AUGMENTATION, _NOISE = 1, 2


# ---- one size --------------------------------------------------------------------------------------------------


def image_array(
    image: "PILImage", num_channels: int, size: tuple[int, int], resize_to: int | None = None
) -> np.ndarray:
    """
    An image resized but not yet cropped.

    Args:
        image (`PIL.Image.Image`): of any mode; grey and colour are converted into each other.
        num_channels (`int`): 1 for grey, 3 for RGB.
        size (`tuple[int, int]`): height and width that a crop needs.
        resize_to (`int`, *optional*): the shorter side in pixels; 0 leaves the resolution alone. `None` makes the
            image just large enough for the crop. Images too small for the crop are always enlarged to it.

    Returns:
        `np.ndarray` of shape `(C, height, width)`, uint8.
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image).convert(PIL_MODES[num_channels])
    least = max(size[0] / image.height, size[1] / image.width)
    factor = least
    if resize_to is not None:
        factor = max(least, resize_to / min(image.size)) if resize_to else max(1.0, least)
    if factor != 1:
        new = (max(size[1], round(image.width * factor)), max(size[0], round(image.height * factor)))
        image = image.resize(new, Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.BICUBIC)
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


class ImageItem(NamedTuple):
    """
    One image of a batch to be.

    Args:
        pixels (`torch.FloatTensor` of shape `(C, H, W)`): the clean image, -1..1 (or its latents).
        key (`tuple[int, int, int]`): seed, epoch and number; what is random about the image follows from it.
    """

    pixels: Tensor
    key: tuple[int, int, int]


def _generator(key: tuple[int, int, int], stream: int) -> np.random.Generator:
    """Randomness of one image in one epoch; streams of one key do not overlap."""
    seed, epoch, index = key
    words = np.array([seed, epoch << 40 | index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=words, counter=np.array([0, 0, 0, stream], dtype=np.uint64)))


@dataclass(frozen=True)
class ImageCut:
    """
    How an encoded image becomes pixels of one size.

    Args:
        size (`tuple[int, int]`): height and width.
        num_channels (`int`, *optional*, defaults to 3): 1 for grey, 3 for RGB; images are converted.
        resize_to (`int`, *optional*): as in [`image_array`].
        random_crop (`bool`, *optional*, defaults to `False`): crop anywhere instead of in the middle.
        horizontal_flip (`bool`, *optional*, defaults to `False`): mirror every other image.

    Raises:
        ValueError: for channels other than 1 and 3.
    """

    size: tuple[int, int]
    num_channels: int = 3
    resize_to: int | None = None
    random_crop: bool = False
    horizontal_flip: bool = False

    def __post_init__(self) -> None:
        if self.num_channels not in PIL_MODES:
            raise ValueError(f"`num_channels` must be 1 (grey) or 3 (RGB), got {self.num_channels}.")

    def decode(self, row: dict[str, Any], number: int) -> np.ndarray:
        """An image (C, height, width), uint8; cropped, unless that is random."""
        array = image_array(decode_image(row, number), self.num_channels, self.size, self.resize_to)
        return array if self.random_crop else self._window(array, 0.5, 0.5)

    def _window(self, array: np.ndarray, down: float, right: float) -> np.ndarray:
        """A window of `size`; 0..1 place it from the first possible place to the last."""
        height, width = self.size
        top = min(int(down * (array.shape[1] - height + 1)), array.shape[1] - height)
        left = min(int(right * (array.shape[2] - width + 1)), array.shape[2] - width)
        return array[:, top : top + height, left : left + width]

    def flips(self, key: tuple[int, int, int]) -> bool:
        """Whether the image of this key is mirrored."""
        return self.horizontal_flip and bool(_generator(key, _AUGMENTATION).random() < 0.5)

    def pixels(self, array: np.ndarray, key: tuple[int, int, int], flip: bool) -> Tensor:
        """A decoded image as (C, H, W) in -1..1, cropped as its key wants it."""
        if self.random_crop:
            places = _generator(key, _AUGMENTATION)
            places.random()  # the first number is the flip's
            array = self._window(array, *places.random(2))
        if flip:
            array = array[:, :, ::-1]
        return torch.from_numpy(array.astype(np.float32, order="C")).div_(127.5).sub_(1)


class Images(torch.utils.data.Dataset):
    """
    Images of one size with values in -1..1. When all of them, decoded, fit into the memory budget they are decoded
    once; otherwise each time they are asked for.

    Args:
        source (`datasets.Dataset`): encoded images, from [`select_images`].
        size (`tuple[int, int]`): height and width.
        num_channels (`int`, *optional*, defaults to 3): 1 for grey, 3 for RGB; images are converted.
        resize_to (`int`, *optional*): as in [`image_array`].
        training (`bool`, *optional*, defaults to `False`): whether to augment, and to change the noise every epoch.
        random_crop (`bool`, *optional*, defaults to `False`): in training, crop anywhere instead of in the middle.
        horizontal_flip (`bool`, *optional*, defaults to `False`): in training, mirror every other image.
        seed (`int`, *optional*, defaults to 0): of augmentation and noise in training; evaluation has one of its own.
        memory_budget (`float`, *optional*, defaults to 2.0): GB of decoded images kept in memory.

    Items: [`ImageItem`].

    Raises:
        ValueError: for no image at all, or channels other than 1 and 3.
    """

    def __init__(
        self,
        source: "datasets.Dataset",
        size: tuple[int, int],
        num_channels: int = 3,
        resize_to: int | None = None,
        training: bool = False,
        random_crop: bool = False,
        horizontal_flip: bool = False,
        seed: int = 0,
        memory_budget: float = MEMORY_BUDGET,
    ) -> None:
        self.cut = ImageCut(size, num_channels, resize_to, training and random_crop, training and horizontal_flip)
        if not len(source):
            raise ValueError("The data set holds no image. Check the files or the split.")
        self.source = source
        self.training = training
        self.seed = seed if training else EVALUATION_SEED
        # shared: workers that outlive an epoch see the next one
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.decoded = self._decode_all(memory_budget * 1e9)

    @property
    def epoch(self) -> int:
        """Pass over the training images, from 0."""
        return int(self._epoch)

    @property
    def in_memory(self) -> bool:
        """Whether the images were decoded once for all."""
        return self.decoded is not None

    def _decode_all(self, budget: float) -> "np.ndarray | list[np.ndarray] | None":
        count = len(self.source)
        sample = [self._decode(index) for index in range(0, count, max(1, count // 32))]
        if sum(array.nbytes for array in sample) / len(sample) * count > budget:
            return None
        rows = (row for batch in self.source.iter(256) for row in batch["image"])
        arrays = (self.cut.decode(row, index) for index, row in enumerate(rows))
        if self.cut.random_crop:  # not cropped yet, so of any size
            return list(arrays)
        decoded = np.empty((count, *sample[0].shape), dtype=np.uint8)
        for index, array in enumerate(arrays):
            decoded[index] = array
        return decoded

    def _decode(self, index: int) -> np.ndarray:
        return self.cut.decode(self.source[index]["image"], index)

    def __len__(self) -> int:
        return len(self.source)

    def set_epoch(self, epoch: int) -> None:
        """Other crops, flips and noise in every epoch; the Trainer calls it."""
        self._epoch.fill_(epoch)

    def key(self, index: int) -> tuple[int, int, int]:
        """What decides everything random about an image."""
        return self.seed, self.epoch if self.training else 0, index

    def flips(self, index: int) -> bool:
        """Whether this epoch mirrors an image."""
        return self.cut.flips(self.key(index))

    def pixels(self, index: int, flip: bool) -> Tensor:
        """One image (C, H, W) in -1..1, cropped as this epoch wants it."""
        array = self._decode(index) if self.decoded is None else self.decoded[index]
        return self.cut.pixels(array, self.key(index), flip)

    def __getitem__(self, index: int) -> ImageItem:
        return ImageItem(self.pixels(index, self.flips(index)), self.key(index))


class Latents(torch.utils.data.Dataset):
    """
    The latents of images: means of an autoencoder's posterior, times its scaling factor. When they fit into the memory
    budget, and the crops do not change, they are computed once (mirrored images too); otherwise batch by batch.

    Args:
        images ([`Images`]): the images.
        vae (`diffusers.AutoencoderKL`): encodes them, where it is.
        memory_budget (`float`, *optional*, defaults to 2.0): GB of latents kept in memory.
        batch_size (`int`, *optional*, defaults to 32): images encoded at a time.

    Items: [`ImageItem`].
    """

    def __init__(self, images: Images, vae: Any, memory_budget: float = MEMORY_BUDGET, batch_size: int = 32) -> None:
        self.images = images
        self.vae = vae
        self.cached: Tensor | None = None
        ways = (False, True) if images.cut.horizontal_flip else (False,)
        first = self._encode([images.pixels(0, False)])
        if images.cut.random_crop or first.nbytes * len(images) * len(ways) > memory_budget * 1e9:
            return
        self.cached = torch.empty((len(images), len(ways), *first.shape[1:]))
        for start in range(0, len(images), batch_size):
            batch = range(start, min(start + batch_size, len(images)))
            for way, flip in enumerate(ways):
                self.cached[batch.start : batch.stop, way] = self._encode([images.pixels(i, flip) for i in batch])

    @property
    def in_memory(self) -> bool:
        """Whether the latents were computed once for all."""
        return self.cached is not None

    def _encode(self, pixels: list[Tensor]) -> Tensor:
        return encode(self.vae, torch.stack(pixels)).cpu()

    def __len__(self) -> int:
        return len(self.images)

    def set_epoch(self, epoch: int) -> None:
        """As for the images."""
        self.images.set_epoch(epoch)

    def __getitems__(self, indices: list[int]) -> list[ImageItem]:
        flips = [self.images.flips(index) for index in indices]
        if self.cached is not None:
            latents = [self.cached[index, int(flip)] for index, flip in zip(indices, flips, strict=True)]
        else:
            pixels = [self.images.pixels(index, flip) for index, flip in zip(indices, flips, strict=True)]
            latents = list(self._encode(pixels))
        return [ImageItem(latent, self.images.key(index)) for latent, index in zip(latents, indices, strict=True)]

    def __getitem__(self, index: int) -> ImageItem:
        return self.__getitems__([index])[0]


class EpochCallback(TrainerCallback):
    """
    Tells training images which epoch it is. (The Trainer does so itself in one process, but not in several.)

    Args:
        images ([`Images`] or [`Latents`]): the training images.
    """

    def __init__(self, images: "Images | Latents") -> None:
        self.images = images

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sets the epoch; a resumed one counts as begun."""
        self.images.set_epoch(int((state.epoch or 0.0) + 1e-9))


# ---- noise -----------------------------------------------------------------------------------------------------


def _draw(items: Sequence[ImageItem], lowest: int, highest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clean images (B, C, H, W), noise of their shape, and a timestep for each, both ends possible."""
    clean = torch.stack([item.pixels for item in items])
    noise = np.empty(clean.shape, dtype=np.float32)
    timesteps = np.empty(len(items), dtype=np.int64)
    for row, item in enumerate(items):
        generator = _generator(item.key, _NOISE)
        timesteps[row] = generator.integers(lowest, highest, endpoint=True) if lowest < highest else highest
        generator.standard_normal(dtype=np.float32, out=noise[row])
    return clean, torch.from_numpy(noise), torch.from_numpy(timesteps)


class NoisyImageCollator:
    """
    Images to a batch for [`EBTForImageDenoising`]: `pixel_values` with noise, `labels` without.

    Args:
        noise_level (`float`, *optional*, defaults to 0.1): share of the whole way to pure noise, as in
            [`noise_scheduler`](../configuration/noise_ebt.py).
        random_noise_level (`tuple[float, float]`, *optional*): instead, for every image a timestep drawn uniformly
            between these shares of a schedule of 1000 steps.

    Raises:
        ValueError: for levels out of range or order.
    """

    def __init__(self, noise_level: float = 0.1, random_noise_level: Sequence[float] | None = None) -> None:
        if random_noise_level is None:
            self.scheduler, self.highest = noise_scheduler(noise_level)
            self.lowest = self.highest
            return
        if len(random_noise_level) != 2 or not 0 <= random_noise_level[0] <= random_noise_level[1] <= 1:
            raise ValueError(
                "`random_noise_level` must be the lowest and the highest share of noise, between 0 and 1, such as "
                f"0.02 0.2; got {' '.join(map(str, random_noise_level))}."
            )
        self.scheduler, last = noise_scheduler(1.0, SCHEDULE_STEPS)
        self.lowest, self.highest = (max(0, share_timesteps(share) - 1) for share in random_noise_level)
        self.highest = min(self.highest, last)

    def __call__(self, items: Sequence[ImageItem]) -> dict[str, Tensor]:
        clean, noise, timesteps = _draw(items, self.lowest, self.highest)
        return {"pixel_values": self.scheduler.add_noise(clean, noise, timesteps), "labels": clean}


class DiffusionCollator:
    """
    Images to a batch for [`DiTTwin`]: `pixel_values` without noise, the noise as `labels`, and `timesteps`.

    Args:
        max_timestep (`int`): timesteps are drawn uniformly from 0 to `max_timestep - 1`.
    """

    def __init__(self, max_timestep: int) -> None:
        self.max_timestep = max_timestep

    def __call__(self, items: Sequence[ImageItem]) -> dict[str, Tensor]:
        clean, noise, timesteps = _draw(items, 0, self.max_timestep - 1)
        return {"pixel_values": clean, "labels": noise, "timesteps": timesteps}


def share_timesteps(share: float) -> int:
    """How many timesteps of a schedule of 1000 a share of noise is."""
    return math.floor(share * SCHEDULE_STEPS + 1e-6)


__all__ = [
    "MEMORY_BUDGET",
    "DiffusionCollator",
    "EpochCallback",
    "ImageCut",
    "ImageItem",
    "Images",
    "Latents",
    "NoisyImageCollator",
    "first_images",
    "hold_out_images",
    "image_array",
    "load_image_files",
    "load_image_set",
    "select_images",
    "share_timesteps",
]
