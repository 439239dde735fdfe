"""
Where images come from: files, folders, tar shards, Hub data sets; as tables, or as streams read while training.

All end as rows `{"image": {"bytes", "path"}}`, still encoded; [`decode_image`] makes a picture of one.
"""

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..modeling_ebt.image_processing_ebt import IMAGE_COLUMNS, LARGEST_16_BIT
from .datasets_library import datasets_library, load_dataset
from .splits import USUAL_NAMES, choose_splits, is_stream


if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image as PILImage

IMAGE_ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
TABLE_LOADERS = {".parquet": "parquet", ".tar": "webdataset"}
ENDINGS = (*IMAGE_ENDINGS, *TABLE_LOADERS)
SPLIT_FOLDERS = {name for names in USUAL_NAMES.values() for name in names}
SPLIT_SEED = 0  # every run holds out the same images, whatever its own seed
PACKAGES = "'ebt-transformers[train,image,diffusers]'"
STREAM_SHARDS = 64  # parts of a long list of files, which are shuffled as a whole


# ---- files -----------------------------------------------------------------------------------------------------


def _expand(split: str, path: str) -> list[str]:
    """The files behind a path, a pattern or a folder, sorted."""
    if "://" in path:
        if not path.lower().endswith(tuple(TABLE_LOADERS)):
            raise ValueError(f"The {split} data {path!r}: only {' and '.join(TABLE_LOADERS)} files are read by URL.")
        return [path]
    if any(letter in path for letter in "*?["):
        found = sorted(name for name in glob.glob(path, recursive=True) if Path(name).is_file())
    elif Path(path).is_dir():
        inside = sorted(Path(path).rglob("*"))
        parts = sorted(name.name for name in inside if name.is_dir() and name.name in SPLIT_FOLDERS)
        if len(set(parts)) > 1:
            raise ValueError(
                f"The {split} data {path!r} has folders for several splits ({', '.join(parts)}), which would be "
                "mixed. Give one of them, or the whole folder as `dataset_name`."
            )
        found = [str(name) for name in inside if name.suffix.lower() in ENDINGS]
    else:
        found = [path] if Path(path).is_file() else []
    if not found:
        raise FileNotFoundError(f"The {split} data {path!r} does not exist or holds no image. Check the path.")
    return found


def load_image_files(files: Mapping[str, Sequence[str]], streaming: bool = False) -> dict[str, Any]:
    """
    Images from files.

    Args:
        files (mapping of split name to list of paths, patterns or folders):
            Image files, `.parquet` files with a column of images, or `.tar` shards as WebDataset writes them (the
            latter two also by URL).
        streaming (`bool`, *optional*, defaults to `False`): read while training, without a copy on disk.

    Returns:
        `dict` of split name to table, or to stream.

    Raises:
        FileNotFoundError: for a path, pattern or folder behind which there is nothing.
        ValueError: for other kinds of files, several kinds in one split, or a folder with several splits.
    """
    library = datasets_library(PACKAGES)
    tables = {}
    for split, paths in files.items():
        names = [name for path in paths for name in _expand(split, path)]
        endings = {Path(name).suffix.lower() for name in names}
        loader = TABLE_LOADERS.get(next(iter(endings))) if len(endings) == 1 else None
        if loader is not None:
            tables[split] = load_dataset(loader, data_files={split: names}, split=split, streaming=streaming)
        elif endings <= set(IMAGE_ENDINGS):
            table = library.Dataset.from_dict({"image": names}).cast_column("image", library.Image())
            tables[split] = _as_stream(table) if streaming else table
        else:
            raise ValueError(
                f"The {split} data must be image files ({', '.join(IMAGE_ENDINGS)}), {' or '.join(TABLE_LOADERS)} "
                f"files, of one kind; got endings {', '.join(sorted(endings)) or 'none'}."
            )
    return tables


def _as_stream(table: "datasets.Dataset") -> "datasets.IterableDataset":
    """A table that is on this machine anyway, read while training, in parts that can be shuffled as a whole."""
    return table.to_iterable_dataset(num_shards=max(1, min(STREAM_SHARDS, len(table))))


def load_image_set(
    name: str,
    config_name: str | None = None,
    streaming: bool = False,
    splits: Mapping[str, str | None] | None = None,
) -> dict[str, Any]:
    """
    Images from a named source.

    Args:
        name (`str`): a dataset id on the Hub, a `.parquet`, `.tar` or image file, a pattern, or a folder (of images,
            of data files, or written by `save_to_disk`); sub-folders named after splits become splits.
        config_name (`str`, *optional*): configuration of a Hub dataset.
        streaming (`bool`, *optional*, defaults to `False`): read while training.
        splits (mapping, *optional*): which splits to take, as in [`choose_splits`].

    Returns:
        `dict` of split name (`train`, and `validation` and `test` where there are some) to table, or to stream.

    Raises:
        FileNotFoundError: for a pattern behind which there is nothing.
        ValueError: for a source without the splits, or options that would be ignored.
    """
    return choose_splits(_all_splits(name, config_name, streaming), splits)


def _all_splits(name: str, config_name: str | None, streaming: bool) -> dict[str, Any]:
    library = datasets_library(PACKAGES)
    path = Path(name)
    files = path.is_file() or any(letter in name for letter in "*?[")
    saved = (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file()
    if config_name is not None and (files or saved):
        raise ValueError(f"{name!r} has no configurations. Leave `dataset_config_name` out.")
    if files:
        return load_image_files({"train": [name]}, streaming)
    loaded = library.load_from_disk(name) if saved else load_dataset(name, config_name, streaming=streaming)
    tables = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    if saved and streaming:  # it lies on disk already: read from there
        return {split: _as_stream(table) for split, table in tables.items()}
    return tables


# ---- tables ----------------------------------------------------------------------------------------------------


def select_images(source: Any, column: str | None = None) -> Any:
    """
    The images of a table or a stream and nothing else (labels stay out), still encoded.

    Args:
        source (`datasets.Dataset` or `datasets.IterableDataset`): rows with a column of images.
        column (`str`, *optional*): the column with the images. `None` takes the only one that holds images, or one
            called `image`, `img`, `images` or `pixel_values`.

    Returns:
        The same kind of source, with the one column `image` of `{"bytes", "path"}`.

    Raises:
        ValueError: if there is no such column (listing those there are), or it holds no images.
    """
    library = datasets_library(PACKAGES)
    features = source.features or {}
    names = list(source.column_names or next(iter(source), {}))
    images = [name for name in names if isinstance(features.get(name), library.Image)]
    if column is None:
        usual = [name for name in IMAGE_COLUMNS if name in (images or names)]
        if len(images) != 1 and not usual:
            raise ValueError(f"Name the column with the images: `image_column`. Columns: {', '.join(names)}.")
        column = images[0] if len(images) == 1 else usual[0]
    if column not in names:
        raise ValueError(f"There is no column {column!r}. Columns: {', '.join(names)}.")
    try:
        table = source.select_columns([column]).cast_column(column, library.Image(decode=False))
        if is_stream(table):
            next(iter(table), None)  # a stream is cast when it is read
    except Exception as error:  # pyarrow has many
        raise ValueError(f"The column {column!r} holds no images but {features.get(column)}.") from error
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


def first_images(source: "datasets.IterableDataset", count: int) -> "datasets.Dataset":
    """
    The beginning of a stream as a table in memory, still encoded.

    Args:
        source (`datasets.IterableDataset`): from [`select_images`].
        count (`int`): rows at most.

    Raises:
        ValueError: if the stream holds nothing.
    """
    library = datasets_library(PACKAGES)
    rows = list(source.take(count))
    if not rows:
        raise ValueError("The stream holds no image to evaluate on. Check the files or the split.")
    return library.Dataset.from_list(rows, features=library.Features({"image": library.Image(decode=False)}))


# ---- one image -------------------------------------------------------------------------------------------------


def decode_image(row: Mapping[str, Any] | None, number: int) -> "PILImage":
    """
    The picture of a row, the right way up.

    Args:
        row (mapping with `bytes` and `path`): an encoded image; without bytes it is read from the path.
        number (`int`): its number in the data, for the error.

    Raises:
        ValueError: for an image that is missing or cannot be read, saying which.
    """
    library = datasets_library(PACKAGES)
    name = f"Image number {number}" + (f" ({row['path']})" if row and row.get("path") else "")
    if not row or (row["bytes"] is None and row["path"] is None):
        raise ValueError(f"{name} is missing: its row is empty. Take the row out, or check `image_column`.")
    try:
        return _eight_bits(library.Image().decode_example(row))
    except Exception as error:  # PIL has many, one for each kind of damage
        raise ValueError(f"{name} cannot be read: {error} Repair it, or take it out of the data.") from error


def _eight_bits(image: "PILImage") -> "PILImage":
    """Pictures of 16 bits as 8; PIL would cut them off at 255."""
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        scale = LARGEST_16_BIT // 255
        return Image.fromarray(np.round(np.asarray(image) / scale).astype(np.uint8))
    if image.mode in ("F", "I"):
        raise ValueError("It has 32 bits, so that nobody knows which number is white; save it with 8 or 16 bits.")
    return image


__all__ = [
    "decode_image",
    "first_images",
    "hold_out_images",
    "load_image_files",
    "load_image_set",
    "select_images",
]
