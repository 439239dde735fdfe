"""
Image data: load images, cut and augment them to one size, and give them noise.

Everything random about an image (crop, flip, noise, timestep) is a function of the seed, the epoch and the image's
number alone. So a run is the same however it is batched, split over processes and workers, or interrupted.
"""

import glob
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..configuration.noise_ebt import SCHEDULE_STEPS, noise_scheduler
from ..modeling_ebt.image_processing_ebt import IMAGE_COLUMNS
from ..modeling_ebt.latents import encode
from .splits import SPLITS


if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image as PILImage

IMAGE_ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
TABLE_ENDING = ".parquet"
PIL_MODES = {1: "L", 3: "RGB"}
MEMORY_BUDGET = 2.0  # GB of decoded images; CIFAR-10 takes 0.15, 100,000 images of 64 x 64 take 1.2
SPLIT_SEED = 0  # every run holds out the same images, whatever its own seed
EVALUATION_SEED = 0  # and sees them with the same noise
_AUGMENTATION, _NOISE = 1, 2


def _datasets() -> Any:
    try:
        import datasets
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Reading images needs `datasets` and `pillow`: pip install 'ebt-transformers[train,image,diffusers]'."
        ) from error
    return datasets


# ---- loading ---------------------------------------------------------------------------------------------------


def _expand(split: str, path: str) -> list[str]:
    """The files behind a path, a pattern or a folder, sorted."""
    if "://" in path:
        return [path]
    if any(letter in path for letter in "*?["):
        found = sorted(name for name in glob.glob(path, recursive=True) if Path(name).is_file())
    elif Path(path).is_dir():
        inside = sorted(Path(path).rglob("*"))
        found = [str(name) for name in inside if name.suffix.lower() in (*IMAGE_ENDINGS, TABLE_ENDING)]
    else:
        found = [path] if Path(path).is_file() else []
    if not found:
        raise FileNotFoundError(f"The {split} data {path!r} does not exist or holds no image. Check the path.")
    return found


def load_image_files(files: Mapping[str, Sequence[str]]) -> "dict[str, datasets.Dataset]":
    """
    Images from local files.

    Args:
        files (mapping of split name to list of paths, patterns or folders): image files, or `.parquet` files with a
            column of images.

    Returns:
        `dict` of split name to table.

    Raises:
        FileNotFoundError: for a path, pattern or folder behind which there is nothing.
        ValueError: for other kinds of files, or both kinds in one split.
    """
    library = _datasets()
    tables = {}
    for split, paths in files.items():
        names = [name for path in paths for name in _expand(split, path)]
        endings = {Path(name).suffix.lower() for name in names}
        if endings == {TABLE_ENDING}:
            tables[split] = library.load_dataset("parquet", data_files={split: names}, split=split)
        elif endings <= set(IMAGE_ENDINGS):
            tables[split] = library.Dataset.from_dict({"image": names}).cast_column("image", library.Image())
        else:
            raise ValueError(
                f"The {split} data must be image files ({', '.join(IMAGE_ENDINGS)}) or {TABLE_ENDING} files, not "
                f"both; got endings {', '.join(sorted(endings)) or 'none'}."
            )
    return tables


def load_image_set(name: str, config_name: str | None = None) -> "dict[str, datasets.Dataset]":
    """
    Images from a named source.

    Args:
        name (`str`): a dataset id on the Hub, a `.parquet` or image file, a pattern, or a folder (of images, of data
            files, or written by `save_to_disk`); sub-folders named after splits become splits.
        config_name (`str`, *optional*): configuration of a Hub dataset.

    Returns:
        `dict` of split name (`train`, and `validation` and `test` where there are some) to table.

    Raises:
        FileNotFoundError: for a pattern behind which there is nothing.
        ValueError: for a source without a `train` split.
    """
    library = _datasets()
    path = Path(name)
    if path.is_file() or any(letter in name for letter in "*?["):
        return load_image_files({"train": [name]})
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        loaded = library.load_from_disk(name)
    else:
        loaded = library.load_dataset(name, config_name)
    splits = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    if "train" not in splits:
        raise ValueError(f"{name!r} has no split 'train'. It has: {', '.join(splits)}.")
    return {split: splits[split] for split in SPLITS if split in splits}


def select_images(source: "datasets.Dataset", column: str | None = None) -> "datasets.Dataset":
    """
    The images of a table and nothing else (labels stay out), still encoded.

    Args:
        source (`datasets.Dataset`): a table.
        column (`str`, *optional*): the column with the images. `None` takes the only one that holds images, or one
            called `image`, `img`, `images` or `pixel_values`.

    Returns:
        `datasets.Dataset` with the one column `image` of `{"bytes", "path"}`.

    Raises:
        ValueError: if there is no such column (listing those there are), or it holds no images.
    """
    library = _datasets()
    names = list(source.column_names)
    images = [name for name in names if isinstance(source.features[name], library.Image)]
    if column is None:
        usual = [name for name in IMAGE_COLUMNS if name in (images or names)]
        if len(images) != 1 and not usual:
            raise ValueError(f"Name the column with the images: `image_column`. Columns: {', '.join(names)}.")
        column = images[0] if len(images) == 1 else usual[0]
    if column not in names:
        raise ValueError(f"There is no column {column!r}. Columns: {', '.join(names)}.")
    try:
        table = source.select_columns([column]).cast_column(column, library.Image(decode=False))
    except Exception as error:  # pyarrow has many
        raise ValueError(f"The column {column!r} holds no images but {source.features[column]}.") from error
    return table if column == "image" else table.rename_column(column, "image")


def hold_out_images(source: "datasets.Dataset", percent: float) -> "tuple[datasets.Dataset, datasets.Dataset]":
    """
    Take a random share of the images for validation, the same ones every time.

    Args:
        source (`datasets.Dataset`): a table.
        percent (`float`): between 0 and 100, both excluded.

    Returns:
        Training and validation table.

    Raises:
        ValueError: for a share out of range, or fewer than 2 images.
    """
    if not 0 < percent < 100:
        raise ValueError(f"`validation_split_percentage` must be between 0 and 100, got {percent}.")
    if len(source) < 2:
        raise ValueError(f"The training data has {len(source)} image(s); none can be held out for validation.")
    held = min(len(source) - 1, max(1, round(len(source) * percent / 100)))
    order = np.random.default_rng(SPLIT_SEED).permutation(len(source))
    return source.select(np.sort(order[held:])), source.select(np.sort(order[:held]))


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
        if num_channels not in PIL_MODES:
            raise ValueError(f"`num_channels` must be 1 (grey) or 3 (RGB), got {num_channels}.")
        if not len(source):
            raise ValueError("The data set holds no image. Check the files or the split.")
        self.source = source
        self.size = size
        self.num_channels = num_channels
        self.resize_to = resize_to
        self.random_crop = training and random_crop
        self.horizontal_flip = training and horizontal_flip
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
        sample = [self._decode(self.source[index]["image"]) for index in range(0, count, max(1, count // 32))]
        if sum(array.nbytes for array in sample) / len(sample) * count > budget:
            return None
        arrays = (self._decode(row) for batch in self.source.iter(256) for row in batch["image"])
        if self.random_crop:  # not cropped yet, so of any size
            return list(arrays)
        decoded = np.empty((count, *sample[0].shape), dtype=np.uint8)
        for index, array in enumerate(arrays):
            decoded[index] = array
        return decoded

    def _decode(self, row: dict[str, Any]) -> np.ndarray:
        from PIL import Image

        with Image.open(row["path"] if row["bytes"] is None else io.BytesIO(row["bytes"])) as image:
            array = image_array(image, self.num_channels, self.size, self.resize_to)
        return array if self.random_crop else self._crop(array, 0.5, 0.5)

    def _crop(self, array: np.ndarray, down: float, right: float) -> np.ndarray:
        """A window of `size`; 0..1 place it from the first possible place to the last."""
        height, width = self.size
        top = min(int(down * (array.shape[1] - height + 1)), array.shape[1] - height)
        left = min(int(right * (array.shape[2] - width + 1)), array.shape[2] - width)
        return array[:, top : top + height, left : left + width]

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
        return self.horizontal_flip and bool(_generator(self.key(index), _AUGMENTATION).random() < 0.5)

    def pixels(self, index: int, flip: bool) -> Tensor:
        """One image (C, H, W) in -1..1, cropped as this epoch wants it."""
        array = self._decode(self.source[index]["image"]) if self.decoded is None else self.decoded[index]
        if self.random_crop:
            places = _generator(self.key(index), _AUGMENTATION)
            places.random()  # the first number is the flip's
            array = self._crop(array, *places.random(2))
        if flip:
            array = array[:, :, ::-1]
        return torch.from_numpy(array.astype(np.float32, order="C")).div_(127.5).sub_(1)

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
        ways = (False, True) if images.horizontal_flip else (False,)
        first = self._encode([images.pixels(0, False)])
        if images.random_crop or first.nbytes * len(images) * len(ways) > memory_budget * 1e9:
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
    "ImageItem",
    "Images",
    "Latents",
    "NoisyImageCollator",
    "hold_out_images",
    "image_array",
    "load_image_files",
    "load_image_set",
    "select_images",
    "share_timesteps",
]
