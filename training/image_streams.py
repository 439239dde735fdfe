"""
Images read while training, from data too large for the disk: an endless stream, cut and augmented like a table.

What is random about an image is a function of the seed, the pass and the image's place in that pass, and the order of
the images one of the seed and the pass. So a run is the same however it is batched, split over processes and workers,
or interrupted, as it is for tables. The price: every dataloader worker reads the whole stream, and decodes its share.
"""

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from ..modeling_ebt.latents import encode
from .images import ImageCut, ImageItem
from .streams import endless, shuffled


if TYPE_CHECKING:
    import datasets

READ_AT_ONCE = 32  # rows


class ImageStream(torch.utils.data.IterableDataset):
    """
    Training images of one size with values in -1..1, without end: pass after pass over a stream.

    Args:
        source (`datasets.IterableDataset`): encoded images, from [`select_images`].
        cut ([`ImageCut`]): how they become pixels.
        seed (`int`, *optional*, defaults to 0): of order, augmentation and noise.
        shuffle_buffer_size (`int`, *optional*, defaults to 0): images shuffled at a time; 0 keeps the order.
        batch_size (`int`, *optional*, defaults to 1):
            That of the dataloader. Its workers take turns by batches; with another number here every image is still
            seen once in a pass, in an order that depends on the number of workers.

    Items: [`ImageItem`].

    Raises:
        ValueError: when read, for a stream without images or an image that cannot be read.

    Example:

    ```python
    >>> from itertools import islice
    >>> from ebt_transformers.assets import example_picture_path
    >>> from ebt_transformers.training.image_streams import ImageStream
    >>> from ebt_transformers.training.images import ImageCut, load_image_files, select_images

    >>> stream = load_image_files({"train": [str(example_picture_path())]}, streaming=True)["train"]
    >>> images = ImageStream(select_images(stream), ImageCut((32, 32)))
    >>> [(tuple(item.pixels.shape), item.key) for item in islice(images, 2)]
    [((3, 32, 32), (0, 0, 0)), ((3, 32, 32), (0, 1, 0))]
    ```
    """

    def __init__(
        self,
        source: "datasets.IterableDataset",
        cut: ImageCut,
        seed: int = 0,
        shuffle_buffer_size: int = 0,
        batch_size: int = 1,
    ) -> None:
        self.source = source
        self.cut = cut
        self.seed = seed
        self.shuffle_buffer_size = shuffle_buffer_size
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[ImageItem]:
        worker = torch.utils.data.get_worker_info()
        own, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        if worker is not None:
            import fsspec.asyn

            fsspec.asyn.reset_lock()  # a forked process inherits the lock of remote files, perhaps locked
        for place, (key, row) in enumerate(endless(self._one_pass)):
            if place // self.batch_size % workers == own:
                array = self.cut.decode(row, key[2])
                yield ImageItem(self.cut.pixels(array, key, self.cut.flips(key)), key)

    def _one_pass(self, epoch: int) -> Iterator[tuple[tuple[int, int, int], dict[str, Any]]]:
        """Keys and encoded images."""
        source = shuffled(self.source, self.seed, epoch, self.shuffle_buffer_size)
        # by batches: a `datasets` stream read row by row in a worker would give it other rows than its siblings
        rows = (row for batch in source.iter(READ_AT_ONCE) for row in batch["image"])
        for place, row in enumerate(rows):
            yield (self.seed, epoch, place), row


class LatentStream(torch.utils.data.IterableDataset):
    """
    The latents of a stream of images, encoded batch by batch: means of the posterior, times the scaling factor.

    Args:
        images ([`ImageStream`]): the images.
        vae (`diffusers.AutoencoderKL`): encodes them, where it is; so without dataloader workers.

    Items: [`ImageItem`].
    """

    def __init__(self, images: ImageStream, vae: Any) -> None:
        self.images = images
        self.vae = vae

    def __iter__(self) -> Iterator[ImageItem]:
        items = iter(self.images)
        while batch := list(islice(items, self.images.batch_size)):
            latents = encode(self.vae, torch.stack([item.pixels for item in batch])).cpu()
            for latent, item in zip(latents, batch, strict=True):
                yield ImageItem(latent, item.key)


__all__ = ["ImageStream", "LatentStream"]
