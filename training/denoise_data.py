"""The images of `ebt train denoise`: its options, and from them what the Trainer sees."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .data_arguments import SplitArguments, check_percentage, hold_out_beginning, wanted_splits
from .script import Refusal, say


if TYPE_CHECKING:
    from .arguments import EBTImageTrainingArguments

DEFAULT_VALIDATION_PERCENT = 5.0
DEFAULT_STREAM_EVAL = 1000  # images of a stream that are evaluated on, unless told


@dataclass
class DataArguments(SplitArguments):
    """Which images, and what is done to them."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "A Hub id, a local folder, a .parquet, .tar or image file, or a pattern."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    train_file: list[str] | None = field(
        default=None,
        metadata={"help": "Training images: .parquet files, .tar shards, image files, patterns or folders."},
    )
    validation_file: list[str] | None = field(default=None, metadata={"help": "Validation images."})
    test_file: list[str] | None = field(default=None, metadata={"help": "Test images."})
    image_column: str | None = field(
        default=None, metadata={"help": "Column with the images. Default: the only one, or 'image'."}
    )
    validation_split_percentage: float | None = field(
        default=None,
        metadata={
            "help": f"Random share of the training images held out when there is no validation data, the same for "
            f"every run. Default: {DEFAULT_VALIDATION_PERCENT:g}; 0 for none."
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many images."})
    max_eval_samples: int | None = field(
        default=None,
        metadata={
            "help": "Evaluate on the first so many images. A stream without validation data gives its first so many "
            f"images to validation; of one with them {DEFAULT_STREAM_EVAL:,} are taken unless told."
        },
    )
    resize_to: int | None = field(
        default=None,
        metadata={
            "help": "Resize the shorter side to so many pixels before cropping; 0 keeps the resolution. Default: what "
            "--image_size needs."
        },
    )
    random_crop: bool = field(
        default=False, metadata={"help": "In training crop anywhere instead of in the middle (see --resize_to)."}
    )
    horizontal_flip: bool = field(default=True, metadata={"help": "In training mirror every other image."})
    image_memory: float = field(
        default=2.0,
        metadata={
            "help": "GB of decoded images (or latents) to keep in memory; data sets that need more are decoded anew "
            "every epoch (--dataloader_num_workers helps)."
        },
    )


def prepare_images(
    data: DataArguments, size: tuple[int, int], channels: int, vae: Any, training: "EBTImageTrainingArguments"
) -> dict[str, Any]:
    """
    The images (or their latents) of each split, with some for validation unless there shall be none.

    Args:
        data: which images.
        size (`tuple[int, int]`): height and width in pixels.
        channels (`int`): 1 or 3.
        vae (`diffusers.AutoencoderKL`, *optional*): makes latents of them.
        training ([`EBTImageTrainingArguments`]): seed, batch size and workers.

    Returns:
        `dict` of split name to items for a collator; `train` is a stream if asked for, the others never are.

    Raises:
        FileNotFoundError, ValueError: for data that cannot be read, saying why.
        SystemExit: for options that contradict each other.
    """
    tables = _load_tables(data)
    if not data.streaming:
        images = {split: _images(split, table, size, channels, data, training) for split, table in tables.items()}
    else:
        stream = _stream(tables.pop("train"), size, channels, data, training)
        beginnings = {split: _beginning(table, data) for split, table in tables.items()}
        held = {split: _images(split, table, size, channels, data, training) for split, table in beginnings.items()}
        images = {"train": stream, **held}
    return images if vae is None else _latents(images, vae, data, training)


def _load_tables(data: DataArguments) -> dict[str, Any]:
    """Encoded images of each split: tables, or streams."""
    from .images import hold_out_images, load_image_files, load_image_set, select_images

    if data.train_file is not None:
        named = {"train": data.train_file, "validation": data.validation_file, "test": data.test_file}
        loaded = load_image_files({split: paths for split, paths in named.items() if paths}, data.streaming)
    else:
        name, splits = str(data.dataset_name), wanted_splits(data)
        loaded = load_image_set(name, data.dataset_config_name, data.streaming, splits)
    tables: dict[str, Any] = {split: select_images(table, data.image_column) for split, table in loaded.items()}
    check_percentage(data, tables)
    if data.streaming:
        hold_out_beginning(data, tables, "images")
    if data.streaming or "validation" in tables:
        return tables
    percent = data.validation_split_percentage
    percent = DEFAULT_VALIDATION_PERCENT if percent is None else percent
    if percent != 0:
        say(f"No validation data: {percent:g} % of the training images are held out for it.")
        tables["train"], tables["validation"] = hold_out_images(tables["train"], percent)
    return tables


def _images(
    split: str,
    table: Any,
    size: tuple[int, int],
    channels: int,
    data: DataArguments,
    training: "EBTImageTrainingArguments",
) -> Any:
    """One split as images of one size."""
    from .images import Images

    trains = split == "train"
    limit = data.max_train_samples if trains else data.max_eval_samples
    if limit is not None:
        table = table.select(range(min(limit, len(table))))
    images = Images(
        table,
        size,
        channels,
        resize_to=data.resize_to,
        training=trains,
        random_crop=data.random_crop,
        horizontal_flip=data.horizontal_flip,
        seed=training.seed,
        memory_budget=data.image_memory,
    )
    where = "decoded in memory" if images.in_memory else "decoded anew every epoch"
    say(f"{split}: {len(images):,} images, {size[0]} x {size[1]}, {where}.")
    return images


def _stream(
    source: Any, size: tuple[int, int], channels: int, data: DataArguments, training: "EBTImageTrainingArguments"
) -> Any:
    """Training images that are read while training."""
    from .image_streams import ImageStream
    from .images import ImageCut

    if data.max_train_samples is not None:
        source = source.take(data.max_train_samples)
    cut = ImageCut(size, channels, data.resize_to, data.random_crop, data.horizontal_flip)
    say(f"train: a stream of images, {size[0]} x {size[1]}, decoded while training.")
    return ImageStream(source, cut, training.seed, data.shuffle_buffer_size, training.train_batch_size)


def _beginning(source: Any, data: DataArguments) -> Any:
    """What of a stream is evaluated on, read once."""
    from .images import first_images

    if data.max_eval_samples is None:
        say(f"Evaluation takes at most the first {DEFAULT_STREAM_EVAL:,} images of a stream (--max_eval_samples).")
    return first_images(source, data.max_eval_samples or DEFAULT_STREAM_EVAL)


def _latents(
    images: dict[str, Any], vae: Any, data: DataArguments, training: "EBTImageTrainingArguments"
) -> dict[str, Any]:
    from .image_streams import ImageStream, LatentStream
    from .images import Latents

    found = {
        split: LatentStream(items, vae) if isinstance(items, ImageStream) else Latents(items, vae, data.image_memory)
        for split, items in images.items()
    }
    if training.dataloader_num_workers and not all(getattr(items, "in_memory", False) for items in found.values()):
        raise Refusal(
            "--dataloader_num_workers cannot encode latents: they do not fit into --image_memory, --random_crop "
            "changes them, or they are streamed. Leave it out."
        )
    return found


__all__ = ["DataArguments", "prepare_images"]
