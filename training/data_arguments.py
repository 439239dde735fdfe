"""What the training scripts share about data: splits by name, and streams."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .script import Refusal, as_flags, given_options, say
from .splits import SPLITS


if TYPE_CHECKING:
    from .arguments import EBTTrainingArguments

SPLIT_OPTIONS = tuple(f"{role}_split" for role in SPLITS)


@dataclass
class SplitArguments:
    """Which splits of a data set, and whether they are read while training."""

    train_split: str | None = field(
        default=None,
        metadata={
            "help": "Split of --dataset_name to train on, or a part of it: train[:1%%], train[1000:], train+extra. "
            "Default: train."
        },
    )
    validation_split: str | None = field(
        default=None, metadata={"help": "Split to validate with. Default: validation, valid, val or dev."}
    )
    test_split: str | None = field(default=None, metadata={"help": "Split to test with. Default: test."})
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the data while training, without a copy on disk. Needs --max_steps."},
    )
    shuffle_buffer_size: int = field(
        default=1000,
        metadata={"help": "With --streaming: rows shuffled at a time; 0 keeps the order."},
    )


def wanted_splits(data: Any) -> dict[str, str | None]:
    """The splits asked for, as [`choose_splits`] takes them."""
    return {role: getattr(data, option) for role, option in zip(SPLITS, SPLIT_OPTIONS, strict=True)}


def check_source_options(data: Any, training: "EBTTrainingArguments") -> None:
    """
    Refuses options about the source that would be ignored, and streams without an end.

    Args:
        data: the options, with `dataset_name`, `dataset_config_name`, `max_eval_samples` and [`SplitArguments`].
        training ([`EBTTrainingArguments`]): the options of training.
    """
    of_named = given_options(data, ("dataset_config_name", *SPLIT_OPTIONS))
    if of_named and data.dataset_name is None:
        raise Refusal(f"{as_flags(of_named)} needs --dataset_name.")
    if data.shuffle_buffer_size < 0:
        raise Refusal(f"--shuffle_buffer_size must be at least 0, got {data.shuffle_buffer_size}.")
    if not data.streaming and given_options(data, ("shuffle_buffer_size",)):
        raise Refusal("--shuffle_buffer_size needs --streaming; otherwise all rows are shuffled.")
    if data.streaming and training.max_steps <= 0:
        raise Refusal("A stream has no known end: say how long to train with --max_steps.")


def hold_out_beginning(data: Any, splits: dict[str, Any], rows: str) -> None:
    """
    Gives the first `--max_eval_samples` rows of a training stream to validation, where there is no validation data.

    Args:
        data: the options.
        splits (`dict`): the streams; changed in place.
        rows (`str`): what the rows are, for the message.
    """
    if "validation" in splits:
        return
    if data.validation_split_percentage:
        raise Refusal(
            "--validation_split_percentage cannot split a stream. Use --validation_file or --max_eval_samples."
        )
    count = data.max_eval_samples
    if count is not None:
        say(f"No validation data: the first {count} {rows} of the stream are held out for it.")
        splits["validation"] = splits["train"].take(count)
        splits["train"] = splits["train"].skip(count)


def check_percentage(data: Any, splits: dict[str, Any]) -> None:
    """Refuses a share to hold out where there is validation data."""
    if data.validation_split_percentage is not None and "validation" in splits:
        raise Refusal("--validation_split_percentage has no effect: there is validation data already. Leave it out.")


__all__ = [
    "SPLIT_OPTIONS",
    "SplitArguments",
    "check_percentage",
    "check_source_options",
    "hold_out_beginning",
    "wanted_splits",
]
