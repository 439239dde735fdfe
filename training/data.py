"""
Text data for language models, as small functions: load documents, turn them into tokens, lay the tokens out in rows.

Two layouts: *packing* joins all documents and cuts them into blocks of one length, so that no token is lost;
*truncation* keeps the beginning of every document, as the paper does.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np
import torch


if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

EMBEDDED = "tiny_shakespeare"
IGNORED_LABEL = -100
SPLITS = ("train", "validation", "test")
LOADERS = {"txt": "text", "text": "text", "jsonl": "json", "json": "json", "csv": "csv", "parquet": "parquet"}
COMPRESSIONS = ("gz", "bz2", "xz", "zst")
TEXT_UNITS = ("document", "paragraph", "line")

# whole texts in memory, a table on disk, or a stream
Documents = Union[list[str], "datasets.Dataset", "datasets.IterableDataset"]
# token ids per document: in memory, a table with the column `input_ids`, or a stream of such rows
Tokens = Union[list[list[int]], "datasets.Dataset", "datasets.IterableDataset"]


# ---- loading ---------------------------------------------------------------------------------------------------


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"Reading this data needs the `datasets` library: pip install datasets. (The embedded text, "
            f"`--dataset_name {EMBEDDED}`, needs nothing.)"
        ) from error
    return datasets


def embedded_documents() -> dict[str, Documents]:
    """The embedded Tiny Shakespeare: one document for each of `train`, `validation` and `test`."""
    from ..assets import shakespeare_splits

    return {name: [text] for name, text in shakespeare_splits().items()}


def loader_of(path: str) -> str:
    """
    The `datasets` loader for a file, from its name (compressed files too).

    Raises:
        ValueError: for an ending there is no loader for.
    """
    parts = Path(path).name.lower().split(".")
    if len(parts) > 2 and parts[-1] in COMPRESSIONS:
        parts = parts[:-1]
    if len(parts) < 2 or parts[-1] not in LOADERS:
        raise ValueError(
            f"Cannot tell the format of {path!r} from its name. Allowed endings: "
            f"{', '.join('.' + ending for ending in LOADERS)} (also followed by .{', .'.join(COMPRESSIONS)})."
        )
    return LOADERS[parts[-1]]


def load_files(
    files: Mapping[str, Sequence[str]], streaming: bool = False, text_unit: str = "document"
) -> dict[str, Any]:
    """
    Documents from local (or http) files.

    Args:
        files (mapping of split name to list of paths or patterns): all of one format.
        streaming (`bool`, *optional*, defaults to `False`): read while training, without a copy on disk.
        text_unit (`str`, *optional*, defaults to `"document"`):
            What one document of a plain text file is: the whole file, a paragraph (between blank lines) or a line.

    Raises:
        FileNotFoundError: for a file that does not exist.
        ValueError: for an empty file, unknown or mixed formats, or an unknown `text_unit`.
    """
    if text_unit not in TEXT_UNITS:
        raise ValueError(f"`text_unit` must be one of {', '.join(TEXT_UNITS)}, got {text_unit!r}.")
    for split, paths in files.items():
        for path in paths:
            is_pattern = "://" in path or any(letter in path for letter in "*?[")
            if not is_pattern and not Path(path).is_file():
                raise FileNotFoundError(f"The {split} file {path!r} does not exist. Check the path.")
            if not is_pattern and Path(path).stat().st_size == 0:
                raise ValueError(f"The {split} file {path!r} is empty. Check the path.")
    kinds = {loader_of(path) for paths in files.values() for path in paths}
    if len(kinds) > 1:
        raise ValueError(f"All files must have one format, got {', '.join(sorted(kinds))}. Convert some of them.")
    kind = kinds.pop()
    options = {"sample_by": text_unit} if kind == "text" else {}
    data_files = {split: list(paths) for split, paths in files.items()}
    return dict(_datasets().load_dataset(kind, data_files=data_files, streaming=streaming, **options))


def load_named(
    name: str, config_name: str | None = None, streaming: bool = False, text_unit: str = "document"
) -> dict[str, Any]:
    """
    Documents from a named source.

    Args:
        name (`str`):
            A dataset id on the Hub, a local file, a local folder (with data files, or written by `save_to_disk`), or
            `"tiny_shakespeare"`.
        config_name (`str`, *optional*): configuration of a Hub dataset.
        streaming (`bool`, *optional*, defaults to `False`): read while training.
        text_unit (`str`, *optional*): see [`load_files`].

    Returns:
        `dict` of split name (`train`, and `validation` and `test` where there are some) to documents.

    Raises:
        ValueError: for a source without a `train` split, or options that would be ignored.
    """
    if name == EMBEDDED:
        if config_name is not None or streaming:
            raise ValueError(f"{EMBEDDED!r} has no configurations and cannot be streamed. Leave those options out.")
        return embedded_documents()
    path = Path(name)
    if path.is_file():
        return load_files({"train": [name]}, streaming, text_unit)
    library = _datasets()
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        if streaming:
            raise ValueError(f"{name!r} was written by save_to_disk and cannot be streamed. Leave `streaming` out.")
        loaded = library.load_from_disk(name)
    else:
        loaded = library.load_dataset(name, config_name, streaming=streaming)
    splits = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    if "train" not in splits:
        raise ValueError(f"{name!r} has no split 'train'. It has: {', '.join(splits)}.")
    return {split: splits[split] for split in SPLITS if split in splits}


def is_stream(source: Any) -> bool:
    """Whether a source is read while training: it has no length."""
    return not hasattr(source, "__len__")


def find_text_column(source: Documents, wanted: str | None = None) -> str:
    """
    The column with the text.

    Args:
        source: documents with columns.
        wanted (`str`, *optional*): its name. `None` takes `text`, or the only column if there is one.

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
        if "text" in columns:
            return "text"
        if len(columns) == 1:
            return columns[0]
        raise ValueError(
            f"There is no column 'text'. Name the text with `text_column`; columns: {', '.join(columns)}."
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
        cut = len(text) - max(1, round(len(text) * percent / 100))
        return [text[:cut]], [text[cut:]]
    cut = total - max(1, round(total * percent / 100))
    if isinstance(source, list):
        return source[:cut], source[cut:]
    return source.select(range(cut)), source.select(range(cut, total))


# ---- tokens ----------------------------------------------------------------------------------------------------


def encode(
    texts: Sequence[str | None], tokenizer: "PreTrainedTokenizerBase", eos: bool, max_length: int | None
) -> list[list[int]]:
    """
    Token ids of texts.

    Args:
        texts (sequence of `str`): `None` counts as empty.
        tokenizer: any tokenizer of transformers.
        eos (`bool`): end every text that is not empty with the end-of-sequence token.
        max_length (`int`, *optional*): keep the first so many tokens.

    Raises:
        TypeError: for anything that is no text.
    """
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise TypeError(f"Texts must be strings, got {type(text).__name__}: {text!r:.60}. Check `text_column`.")
    clean = [text or "" for text in texts]
    rows = tokenizer(clean, return_attention_mask=False, verbose=False)["input_ids"] if clean else []
    rows = [row if text else [] for row, text in zip(rows, clean, strict=True)]
    end = tokenizer.eos_token_id
    if eos and end is not None:
        rows = [[*row, end] if row and row[-1] != end else row for row in rows]
    return rows if max_length is None else [row[:max_length] for row in rows]


def tokenize(
    source: Documents,
    tokenizer: "PreTrainedTokenizerBase",
    text_column: str | None = None,
    eos: bool = True,
    max_length: int | None = None,
    num_workers: int | None = None,
) -> Tokens:
    """
    Token ids of documents, one row per document.

    Args:
        source: documents in memory, as a `datasets` table or stream.
        tokenizer: any tokenizer of transformers.
        text_column (`str`, *optional*): as in [`find_text_column`].
        eos, max_length: as in [`encode`].
        num_workers (`int`, *optional*): processes for a table.

    Returns:
        The same kind of source, with the token ids (column `input_ids`).
    """
    if isinstance(source, list):
        return encode(source, tokenizer, eos, max_length)
    column = find_text_column(source, text_column)

    def encode_batch(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        return {"input_ids": encode(batch[column], tokenizer, eos, max_length)}

    if is_stream(source):
        known = source.column_names or list(next(iter(source)))
        return source.map(encode_batch, batched=True, batch_size=100, remove_columns=known)
    return source.map(
        encode_batch,
        batched=True,
        num_proc=num_workers,
        remove_columns=source.column_names,
        desc="Tokenizing",
    )


def _flat_pieces(tokens: Tokens) -> list[np.ndarray]:
    """All tokens of a table or list in order, as a few flat arrays; a table on disk stays there (memory-mapped)."""
    if isinstance(tokens, list):
        return [np.fromiter((token for row in tokens for token in row), dtype=np.int64)]
    column = tokens.with_format("arrow")[:]["input_ids"]
    return [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]


# ---- packing ---------------------------------------------------------------------------------------------------


def _block(tokens: np.ndarray, block_size: int, pad_token_id: int) -> dict[str, torch.Tensor]:
    """One row; a short one is filled up with padding that is neither scored nor seen by what precedes it."""
    ids = torch.from_numpy(np.array(tokens, dtype=np.int64))
    labels = ids
    missing = block_size - len(ids)
    if missing:
        labels = torch.cat([ids, ids.new_full((missing,), IGNORED_LABEL)])
        ids = torch.cat([ids, ids.new_full((missing,), pad_token_id)])
    return {"input_ids": ids, "labels": labels}


class PackedBlocks(torch.utils.data.Dataset):
    """
    Documents joined and cut into blocks of `block_size` tokens. Blocks are cut when they are asked for; nothing is
    copied.

    Args:
        tokens: token ids per document, in memory or as a `datasets` table.
        block_size (`int`, at least 2): tokens per block.
        keep_remainder (`bool`, *optional*, defaults to `False`):
            Whether the last tokens that fill no block become a padded one (for evaluation) or are left out (their
            number is `dropped_tokens`). They are always kept when there is no full block.
        pad_token_id (`int`, *optional*, defaults to 0): what fills up the padded block.
        max_blocks (`int`, *optional*): keep the first so many blocks.

    Items: `{"input_ids": (block_size,), "labels": (block_size,)}`.

    Raises:
        ValueError: if there are fewer than 2 tokens, or for a block size below 2.
    """

    def __init__(
        self,
        tokens: Tokens,
        block_size: int,
        keep_remainder: bool = False,
        pad_token_id: int = 0,
        max_blocks: int | None = None,
    ) -> None:
        _check_block_size(block_size)
        self.pieces = _flat_pieces(tokens)
        self.ends = np.cumsum([len(piece) for piece in self.pieces])
        self.block_size = block_size
        self.pad_token_id = pad_token_id
        self.num_tokens = int(self.ends[-1]) if len(self.ends) else 0
        if self.num_tokens < 2:
            raise ValueError(
                f"The data set has {self.num_tokens} tokens; at least 2 are needed. Check the file or split."
            )
        full, remainder = divmod(self.num_tokens, block_size)
        # one single token predicts nothing
        padded = int(remainder >= 2 and (keep_remainder or full == 0))
        self.dropped_tokens = 0 if padded else remainder
        self.num_blocks = full + padded if max_blocks is None else min(max_blocks, full + padded)

    def __len__(self) -> int:
        return self.num_blocks

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not -self.num_blocks <= index < self.num_blocks:
            raise IndexError(f"Block {index} of {self.num_blocks}.")
        start = (index % self.num_blocks) * self.block_size
        return _block(self._between(start, start + self.block_size), self.block_size, self.pad_token_id)

    def _between(self, start: int, stop: int) -> np.ndarray:
        parts = []
        piece = int(np.searchsorted(self.ends, start, side="right"))
        while piece < len(self.pieces) and start < stop:
            offset = int(self.ends[piece]) - len(self.pieces[piece])
            part = self.pieces[piece][start - offset : stop - offset]
            parts.append(part)
            start += len(part)
            piece += 1
        return np.concatenate(parts)


class PackedStream(torch.utils.data.IterableDataset):
    """
    The same for a stream: what is left of one document goes on in the next block. Only the tokens that fill no block
    at the very end are left out (or padded, with `keep_remainder`).

    Args:
        tokens (iterable of `{"input_ids": [...]}`): token ids per document.
        block_size, keep_remainder, pad_token_id, max_blocks: as in [`PackedBlocks`].
    """

    def __init__(
        self,
        tokens: Iterable[Mapping[str, Any]],
        block_size: int,
        keep_remainder: bool = False,
        pad_token_id: int = 0,
        max_blocks: int | None = None,
    ) -> None:
        _check_block_size(block_size)
        self.tokens = tokens
        self.block_size = block_size
        self.keep_remainder = keep_remainder
        self.pad_token_id = pad_token_id
        self.max_blocks = max_blocks

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return islice(self._blocks(), self.max_blocks)

    def _blocks(self) -> Iterator[dict[str, torch.Tensor]]:
        rest: list[int] = []
        for row in self.tokens:
            rest.extend(row["input_ids"])
            for start in range(0, len(rest) - self.block_size + 1, self.block_size):
                yield _block(np.array(rest[start : start + self.block_size]), self.block_size, self.pad_token_id)
            rest = rest[len(rest) // self.block_size * self.block_size :]
        if len(rest) >= 2 and self.keep_remainder:
            yield _block(np.array(rest), self.block_size, self.pad_token_id)
        elif rest:
            logger.info("The stream ended; its last %d tokens fill no block and were left out.", len(rest))

    def set_epoch(self, epoch: int) -> None:
        """Reshuffle a shuffled stream; the Trainer calls it before every epoch."""
        if hasattr(self.tokens, "set_epoch"):
            self.tokens.set_epoch(epoch)


def held_out_blocks(
    tokenizer: "PreTrainedTokenizerBase", block_size: int, split: str = "test"
) -> list[dict[str, torch.Tensor]]:
    """
    A split of the embedded text as blocks, cut as in training, the last one padded.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): cuts the text into tokens.
        block_size (`int`): tokens per block.
        split (`str`, *optional*, defaults to `"test"`): `"train"`, `"validation"` or `"test"`.
    """
    blocks = PackedBlocks(tokenize(embedded_documents()[split], tokenizer), block_size, keep_remainder=True)
    return [blocks[index] for index in range(len(blocks))]


def _check_block_size(block_size: int) -> None:
    if block_size < 2:
        raise ValueError(
            f"`block_size` must be at least 2 (one token to predict from, one to predict), got {block_size}."
        )


# ---- truncation ------------------------------------------------------------------------------------------------


class TruncatedDocuments(torch.utils.data.Dataset):
    """
    One row per document: the beginning of it, as [`tokenize`] with `max_length` left it. Documents of fewer than 2
    tokens predict nothing and are left out; their number is `dropped_documents`.

    Args:
        tokens: token ids per document, in memory or as a `datasets` table.
        max_documents (`int`, *optional*): keep the first so many.

    Items: `{"input_ids": (length,)}`.

    Raises:
        ValueError: if no document has 2 tokens.
    """

    def __init__(self, tokens: Tokens, max_documents: int | None = None) -> None:
        self.tokens = tokens
        if isinstance(tokens, list):
            lengths = np.array([len(row) for row in tokens], dtype=np.int64)
        else:
            column = tokens.with_format("arrow")[:]["input_ids"]
            pieces = [np.diff(chunk.offsets.to_numpy()) for chunk in column.chunks]
            lengths = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)
        usable = np.flatnonzero(lengths >= 2)
        self.dropped_documents = len(lengths) - len(usable)
        if not len(usable):
            raise ValueError(
                f"None of the {len(lengths)} documents has 2 tokens or more. Check the file, the split or the "
                "text column."
            )
        self.rows = usable[:max_documents]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        number = int(self.rows[index])
        ids = self.tokens[number] if isinstance(self.tokens, list) else self.tokens[number]["input_ids"]
        return {"input_ids": torch.tensor(ids, dtype=torch.long)}


class TruncatedStream(torch.utils.data.IterableDataset):
    """[`TruncatedDocuments`] for a stream of `{"input_ids": [...]}`."""

    def __init__(self, tokens: Iterable[Mapping[str, Any]], max_documents: int | None = None) -> None:
        self.tokens = tokens
        self.max_documents = max_documents

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        usable = (row["input_ids"] for row in self.tokens if len(row["input_ids"]) >= 2)
        for ids in islice(usable, self.max_documents):
            yield {"input_ids": torch.tensor(ids, dtype=torch.long)}

    def set_epoch(self, epoch: int) -> None:
        """Reshuffle a shuffled stream; the Trainer calls it before every epoch."""
        if hasattr(self.tokens, "set_epoch"):
            self.tokens.set_epoch(epoch)


@dataclass
class CausalLMCollator:
    """
    Rows to a batch. Rows with labels (packed blocks) are stacked; rows without are padded on the right, with an
    attention mask and labels that leave the padding out.

    Args:
        pad_token_id (`int`): what fills up short rows.
        pad_to (`int`, *optional*): length of every row; `None` means the longest of the batch.
    """

    pad_token_id: int
    pad_to: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        if "labels" in rows[0]:
            return {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}
        length = self.pad_to or max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), length), self.pad_token_id)
        mask = torch.zeros((len(rows), length), dtype=torch.long)
        for number, row in enumerate(rows):
            ids[number, : len(row["input_ids"])] = row["input_ids"]
            mask[number, : len(row["input_ids"])] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED_LABEL)}


__all__ = [
    "EMBEDDED",
    "CausalLMCollator",
    "PackedBlocks",
    "PackedStream",
    "TruncatedDocuments",
    "TruncatedStream",
    "embedded_documents",
    "encode",
    "find_text_column",
    "held_out_blocks",
    "is_stream",
    "load_files",
    "load_named",
    "loader_of",
    "split_off_validation",
    "tokenize",
]
