"""Documents for language models: from files, folders, the Hub, or the embedded text; which column, which split."""

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union
from urllib.parse import urlsplit

from .datasets_library import datasets_library, load_dataset
from .splits import choose_splits, is_stream


if TYPE_CHECKING:
    import datasets

EMBEDDED = "tiny_shakespeare"
LOADERS = {"txt": "text", "text": "text", "jsonl": "json", "json": "json", "csv": "csv", "parquet": "parquet"}
COMPRESSIONS = ("gz", "bz2", "xz", "zst")
TEXT_UNITS = ("document", "paragraph", "line")
CHAT_COLUMN = "messages"
# columns of data sets for fine-tuning, whose rows are no texts by themselves
TRL_COLUMNS = ("prompt", "completion", "chosen", "rejected", "conversations")
USE_TRL = "fine-tune with TRL, which knows conversations, prompts and preferences (docs/howto/trl.md)"

# whole texts in memory, a table on disk, or a stream
Documents = Union[list[str], "datasets.Dataset", "datasets.IterableDataset"]


def embedded_documents() -> dict[str, Documents]:
    """The embedded Tiny Shakespeare: one document for each of `train`, `validation` and `test`."""
    from ..assets import shakespeare_splits

    return {name: [text] for name, text in shakespeare_splits().items()}


def loader_of(path: str) -> str:
    """
    The `datasets` loader for a file, from its name (compressed files too).

    Args:
        path (`str`): a path, a pattern or a URL.

    Raises:
        ValueError: for an ending there is no loader for.
    """
    parts = Path(urlsplit(path).path if "://" in path else path).name.lower().split(".")
    if len(parts) > 2 and parts[-1] in COMPRESSIONS:
        parts = parts[:-1]
    if len(parts) < 2 or parts[-1] not in LOADERS:
        raise ValueError(
            f"Cannot tell the format of {path!r} from its name. Allowed endings: "
            f"{', '.join('.' + ending for ending in LOADERS)} (also followed by .{', .'.join(COMPRESSIONS)})."
        )
    return LOADERS[parts[-1]]


def _check_unit(text_unit: str | None) -> None:
    if text_unit is not None and text_unit not in TEXT_UNITS:
        raise ValueError(f"`text_unit` must be one of {', '.join(TEXT_UNITS)}, got {text_unit!r}.")


def _sampling(is_text: bool, text_unit: str | None, default_unit: str, source: str) -> dict[str, str]:
    """How the loader of plain text cuts its files; other formats say themselves what a document is."""
    if is_text:
        return {"sample_by": text_unit or default_unit}
    if text_unit is not None:
        raise ValueError(f"`text_unit` is about .txt files; the rows of {source} are its documents. Leave it out.")
    return {}


def _check_file(split: str, path: str) -> None:
    if path.lower().endswith(".zst"):
        from fsspec.compression import compr

        if "zstd" not in compr:
            raise ImportError(f"The {split} file {path!r} needs zstandard to be read: pip install zstandard.")
    if "://" in path:
        return  # the loader says when it finds nothing
    if any(letter in path for letter in "*?["):
        if not glob.glob(path, recursive=True):
            raise FileNotFoundError(f"No {split} file matches {path!r}. Check the pattern.")
        return
    if Path(path).is_dir():
        raise ValueError(f"The {split} file {path!r} is a folder. Give its files ({path}/*.txt) or `dataset_name`.")
    if not Path(path).is_file():
        raise FileNotFoundError(f"The {split} file {path!r} does not exist. Check the path.")
    if Path(path).stat().st_size == 0:
        raise ValueError(f"The {split} file {path!r} is empty. Check the path.")


def load_files(
    files: Mapping[str, Sequence[str]],
    streaming: bool = False,
    text_unit: str | None = None,
    default_unit: str = "document",
) -> dict[str, Any]:
    """
    Documents from local (or http) files.

    Args:
        files (mapping of split name to list of paths, patterns or URLs): all of one format.
        streaming (`bool`, *optional*, defaults to `False`): read while training, without a copy on disk.
        text_unit (`str`, *optional*):
            What one document of a plain text file is: the whole file (`document`), a `paragraph` (between blank
            lines) or a `line`. Raises for other formats.
        default_unit (`str`, *optional*, defaults to `"document"`): the same, where `text_unit` says nothing.

    Raises:
        FileNotFoundError: for a file that does not exist.
        ValueError: for an empty file, a folder, unknown or mixed formats, or a `text_unit` that is unknown or of no
            use.
    """
    _check_unit(text_unit)
    for split, paths in files.items():
        for path in paths:
            _check_file(split, path)
    kinds = {loader_of(path) for paths in files.values() for path in paths}
    if len(kinds) > 1:
        raise ValueError(f"All files must have one format, got {', '.join(sorted(kinds))}. Convert some of them.")
    kind = kinds.pop()
    options = _sampling(kind == "text", text_unit, default_unit, f"a {kind} file")
    data_files = {split: list(paths) for split, paths in files.items()}
    return dict(load_dataset(kind, data_files=data_files, streaming=streaming, **options))


def load_named(
    name: str,
    config_name: str | None = None,
    streaming: bool = False,
    text_unit: str | None = None,
    default_unit: str = "document",
    splits: Mapping[str, str | None] | None = None,
) -> dict[str, Any]:
    """
    Documents from a named source.

    Args:
        name (`str`):
            A dataset id on the Hub, a local file, a local folder (with data files, or written by `save_to_disk`), or
            `"tiny_shakespeare"`.
        config_name (`str`, *optional*): configuration of a Hub dataset.
        streaming (`bool`, *optional*, defaults to `False`): read while training.
        text_unit, default_unit (`str`, *optional*): see [`load_files`]; folders and Hub datasets of .txt files too.
        splits (mapping, *optional*): which splits to take, as in [`choose_splits`].

    Returns:
        `dict` of split name (`train`, and `validation` and `test` where there are some) to documents.

    Raises:
        ValueError: for a source without the splits, or options that would be ignored.
    """
    _check_unit(text_unit)
    return choose_splits(_all_splits(name, config_name, streaming, text_unit, default_unit), splits)


def _all_splits(
    name: str, config_name: str | None, streaming: bool, text_unit: str | None, default_unit: str
) -> dict[str, Any]:
    path = Path(name)
    saved = (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file()
    if config_name is not None and (name == EMBEDDED or path.is_file() or saved):
        raise ValueError(f"{name!r} has no configurations. Leave `dataset_config_name` out.")
    if name == EMBEDDED:
        if streaming:
            raise ValueError(f"{EMBEDDED!r} cannot be streamed. Leave `streaming` out.")
        _sampling(False, text_unit, default_unit, EMBEDDED)
        return embedded_documents()
    if path.is_file():
        return load_files({"train": [name]}, streaming, text_unit, default_unit)
    if saved:
        if streaming:
            raise ValueError(f"{name!r} was written by save_to_disk and cannot be streamed. Leave `streaming` out.")
        _sampling(False, text_unit, default_unit, name)
        loaded = datasets_library().load_from_disk(name)
    else:
        options = _sampling(_is_plain_text(name, config_name), text_unit, default_unit, name)
        loaded = load_dataset(name, config_name, streaming=streaming, **options)
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def _is_plain_text(name: str, config_name: str | None) -> bool:
    """Whether a folder or a Hub dataset consists of .txt files."""
    try:
        builder = datasets_library().load_dataset_builder(name, config_name)
    except ConnectionError:
        return False  # without a connection the loader may still find a copy on disk, or says what is wrong
    return hasattr(builder.config, "sample_by")


def find_text_column(source: Documents, wanted: str | None = None) -> str:
    """
    The column with the text.

    Args:
        source: documents with columns.
        wanted (`str`, *optional*): its name. `None` takes `text`, the conversations in `messages`, or the only column
            if there is one.

    Raises:
        ValueError: if there is no such column (listing those there are) or no document at all.
    """
    columns = getattr(source, "column_names", None)
    if columns is None:
        first = next(iter(source), None)
        if first is None:
            raise ValueError("The data set is empty. Check the file or the split.")
        columns = list(first)
    if wanted is None:
        usual = [name for name in ("text", CHAT_COLUMN) if name in columns]
        if usual or len(columns) == 1:
            return usual[0] if usual else columns[0]
        hint = f"; or {USE_TRL}" if set(columns) & set(TRL_COLUMNS) else ""
        raise ValueError(
            f"There is no column 'text'. Name the text with `text_column`; columns: {', '.join(columns)}{hint}."
        )
    if wanted not in columns:
        raise ValueError(f"There is no column {wanted!r}. Columns: {', '.join(columns)}.")
    return wanted


def split_off_validation(
    source: Documents, percent: float, text_column: str | None = None
) -> tuple[Documents, Documents]:
    """
    Take the last `percent` of the documents for validation; of a single document the last `percent` of its characters.

    Args:
        source: documents with a length.
        percent (`float`): between 0 and 100, both excluded.
        text_column (`str`, *optional*): as in [`find_text_column`].

    Returns:
        Training and validation documents.

    Raises:
        ValueError: for a share out of range or a stream.
    """
    if not 0 < percent < 100:
        raise ValueError(f"`validation_split_percentage` must be between 0 and 100, got {percent}.")
    if is_stream(source):
        raise ValueError(
            "A stream has no last part to validate on. Give `validation_file`, or `max_eval_samples` to take the "
            "first documents."
        )
    total = len(source)
    if total == 0:
        raise ValueError("The training data is empty. Check the file or the split.")
    if total == 1:
        text = source[0] if isinstance(source, list) else source[0][find_text_column(source, text_column)]
        if not isinstance(text, str):
            raise ValueError("The only document is no text that could be split. Give `validation_file`, or 0 percent.")
        cut = len(text) - max(1, round(len(text) * percent / 100))
        return [text[:cut]], [text[cut:]]
    cut = total - max(1, round(total * percent / 100))
    if isinstance(source, list):
        return source[:cut], source[cut:]
    return source.select(range(cut)), source.select(range(cut, total))


__all__ = [
    "CHAT_COLUMN",
    "EMBEDDED",
    "USE_TRL",
    "Documents",
    "embedded_documents",
    "find_text_column",
    "load_files",
    "load_named",
    "loader_of",
    "split_off_validation",
]
