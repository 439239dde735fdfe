"""What pipelines of pictures do alike: one picture or many in, their results out in the same form and order."""

import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset
from transformers.image_utils import is_pil_image
from transformers.utils import IMAGE_PROCESSOR_NAME
from transformers.utils.logging import tqdm

from ..modeling_ebt.image_processing_ebt import IMAGE_COLUMNS, EBTImageProcessor
from .carried_code import PipelineWithCode


LONG_LIST = 10  # longer ones show a progress bar


class Rows(Dataset):
    """
    A sequence as a torch dataset, which a pipeline walks lazily.

    Args:
        rows (sequence): the rows.
    """

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def is_one_picture(images: Any) -> bool:
    """Whether what a user hands in is a single picture, or a row with one."""
    return isinstance(images, (str, os.PathLike, np.ndarray, Tensor, Mapping)) or is_pil_image(images)


def picture_of(row: Any) -> Any:
    """
    The picture of a data set's row; what is no row stays as it is.

    Args:
        row (mapping or picture): a row has its picture in a column `image`, `img`, `images` or `pixel_values`.

    Raises:
        ValueError: for a row without a picture.
    """
    if not isinstance(row, Mapping):
        return row
    column = next((name for name in IMAGE_COLUMNS if name in row), None)
    if column is None:
        raise ValueError(f"A row of the dataset has no image: it has {', '.join(row)}, not {IMAGE_COLUMNS[0]}.")
    return row[column]


class PicturePipeline(PipelineWithCode):
    """
    A pipeline from pictures to results, with an [`EBTImageProcessor`]: the one given, the one saved beside the model,
    or one made from its config.

    Args:
        args, kwargs: of transformers' `Pipeline`.

    Attributes:
        DOING (`str`): what the progress bar says.
    """

    INPUT_TYPE = "image"
    SAVED_BESIDE = ("image_processor",)
    DOING: ClassVar[str]

    _load_processor = False
    _load_image_processor: bool | None = None
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    image_processor: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._check_model()
        self.model.eval()
        if self.image_processor is None:
            self.image_processor = self._own_processor()

    @abstractmethod
    def _check_model(self) -> None:
        """Raises a `TypeError` for a model of another kind."""

    def _own_processor(self) -> EBTImageProcessor:
        """The processor saved beside the model, or one made from its config."""
        # where transformers' AutoImageProcessor cannot load it, it hands over none instead of saying so
        folder = str(self.model.name_or_path)
        if os.path.isfile(os.path.join(folder, IMAGE_PROCESSOR_NAME)):
            return EBTImageProcessor.from_pretrained(folder)
        return EBTImageProcessor.from_model_config(self.model.config)

    @property
    def _pictures_at_once(self) -> Any:
        """The batch size given at construction, where there was one."""
        given = getattr(self, "_batch_size", None)  # transformers'
        return 1 if given is None else given

    def _run_pictures(
        self,
        images: Any,
        batch_size: int | None,
        num_workers: int | None,
        progress: bool | None,
        options: dict[str, Any],
    ) -> Any:
        """
        Results for pictures: of one picture a result, of a list or a batch a list, of anything else an iterator.

        Args:
            images: what the class's `__call__` takes.
            batch_size (`int`, *optional*): pictures that go through the model at once.
            num_workers (`int`, *optional*): processes that read the pictures.
            progress (`bool`, *optional*): show a progress bar; by default for lists of more than 10 pictures.
            options (`dict`): of this call.
        """
        at_once = self._pictures_at_once if batch_size is None else batch_size
        if not isinstance(at_once, int) or at_once < 1:
            raise ValueError(f"`batch_size` must be an integer of at least 1, got {at_once!r}.")
        if isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4:
            images = list(images)
        if is_one_picture(images):
            return super().__call__(images, num_workers=num_workers, **options)
        is_list = isinstance(images, (list, tuple))
        if is_list and len(images) == 0:
            raise ValueError("There is no picture: the list is empty. Give at least one.")
        if not isinstance(images, (Dataset, Iterator)):
            images = Rows(images) if hasattr(images, "__len__") else iter(images)
        if isinstance(images, Iterator):
            images = (image for image in images)  # the base class knows generators
        total = len(images) if hasattr(images, "__len__") else None
        results = super().__call__(images, batch_size=batch_size, num_workers=num_workers, **options)
        shown = progress if progress is not None else is_list and (total or 0) > LONG_LIST
        if shown:
            results = tqdm(results, total=total, desc=self.DOING, unit="image")
        return list(results) if is_list else iter(results)


__all__ = ["PicturePipeline", "Rows", "is_one_picture", "picture_of"]
