"""
Text data for language models, as small functions: turn documents into tokens, lay the tokens out in rows.

Two layouts: *packing* joins all documents and cuts them into blocks of one length, so that no token is lost;
*truncation* keeps the beginning of every document, as the paper does.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Union

import numpy as np
import torch

from .splits import is_stream
from .streams import endless, shuffled
from .text_loading import (
    EMBEDDED,
    USE_TRL,
    Documents,
    embedded_documents,
    find_text_column,
    load_files,
    load_named,
    loader_of,
    split_off_validation,
)


if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

IGNORED_LABEL = -100

# token ids per document: in memory, a table with the column `input_ids`, or a stream of such rows
Tokens = Union[list[list[int]], "datasets.Dataset", "datasets.IterableDataset"]


# ---- tokens ----------------------------------------------------------------------------------------------------


def _is_conversation(document: Any) -> bool:
    return isinstance(document, list) and all(isinstance(turn, Mapping) and "role" in turn for turn in document)


def _conversations_as_text(documents: Sequence[Any], tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    if tokenizer.chat_template is None:
        raise ValueError(
            "The documents are conversations, and the tokenizer has no chat template to write them down with. Take a "
            f"tokenizer that has one, name a column of texts (`text_column`), or {USE_TRL}."
        )
    return [tokenizer.apply_chat_template(turns, tokenize=False) if turns else "" for turns in documents]


def encode(
    texts: Sequence[str | list[dict[str, Any]] | None],
    tokenizer: "PreTrainedTokenizerBase",
    eos: bool,
    max_length: int | None,
) -> list[list[int]]:
    """
    Token ids of texts, or of conversations.

    Args:
        texts (sequence of `str`, or of lists of `{"role": ..., "content": ...}`):
            `None` counts as empty. Conversations are written down with the tokenizer's chat template.
        tokenizer: any tokenizer of transformers.
        eos (`bool`): end every text that is not empty with the end-of-sequence token.
        max_length (`int`, *optional*): keep the first so many tokens.

    Raises:
        TypeError: for anything that is no text.
        ValueError: for conversations and a tokenizer without a chat template.
    """
    clean: list[Any] = ["" if text is None else text for text in texts]
    chat = any(_is_conversation(text) for text in clean if text)
    if chat and all(_is_conversation(text) for text in clean if text):
        clean = _conversations_as_text(clean, tokenizer)
    for text in clean:
        if not isinstance(text, str):
            raise TypeError(
                f"Texts must be strings, got {type(text).__name__}: {text!r:.60}. Check `text_column`, or {USE_TRL}."
            )
    options = {"return_attention_mask": False, "verbose": False}
    if chat:
        options["add_special_tokens"] = False  # the template wrote them
    rows = tokenizer(clean, **options)["input_ids"] if clean else []
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
        first = next(iter(source), None)
        if first is None:
            raise ValueError("The stream is empty. Check the file or the split.")
        encode([first[column]], tokenizer, eos, max_length)  # what is no text is refused now, not while training
        known = source.column_names or list(first)
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
        repeat (`bool`, *optional*, defaults to `False`):
            For training: start over at the end, again and again. A block may join two passes.
        shuffle_buffer_size (`int`, *optional*, defaults to 0): documents shuffled at a time; 0 keeps the order.
        seed (`int`, *optional*, defaults to 0): of the order, which is another one in every pass.
    """

    def __init__(
        self,
        tokens: Iterable[Mapping[str, Any]],
        block_size: int,
        keep_remainder: bool = False,
        pad_token_id: int = 0,
        max_blocks: int | None = None,
        repeat: bool = False,
        shuffle_buffer_size: int = 0,
        seed: int = 0,
    ) -> None:
        _check_block_size(block_size)
        self.documents = _DocumentStream(tokens, 1, repeat, shuffle_buffer_size, seed)
        self.block_size = block_size
        self.keep_remainder = keep_remainder
        self.pad_token_id = pad_token_id
        self.max_blocks = max_blocks

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return islice(self._blocks(), self.max_blocks)

    def _blocks(self) -> Iterator[dict[str, torch.Tensor]]:
        rest: list[int] = []
        for ids in self.documents:
            rest.extend(ids)
            for start in range(0, len(rest) - self.block_size + 1, self.block_size):
                yield _block(np.array(rest[start : start + self.block_size]), self.block_size, self.pad_token_id)
            rest = rest[len(rest) // self.block_size * self.block_size :]
        if len(rest) >= 2 and self.keep_remainder:
            yield _block(np.array(rest), self.block_size, self.pad_token_id)
        elif rest:
            logger.info("The stream ended; its last %d tokens fill no block and were left out.", len(rest))


class _DocumentStream:
    """Token ids of the documents of a stream that have at least `shortest` of them; perhaps without end."""

    def __init__(
        self, tokens: Iterable[Mapping[str, Any]], shortest: int, repeat: bool, shuffle_buffer_size: int, seed: int
    ) -> None:
        self.tokens = tokens
        self.shortest = shortest
        self.repeat = repeat
        self.shuffle_buffer_size = shuffle_buffer_size
        self.seed = seed

    def _one_pass(self, epoch: int) -> Iterator[list[int]]:
        for row in shuffled(self.tokens, self.seed, epoch, self.shuffle_buffer_size):
            if len(row["input_ids"]) >= self.shortest:
                yield row["input_ids"]

    def __iter__(self) -> Iterator[list[int]]:
        return endless(self._one_pass) if self.repeat else self._one_pass(0)


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
    """
    [`TruncatedDocuments`] for a stream.

    Args:
        tokens (iterable of `{"input_ids": [...]}`): token ids per document.
        max_documents (`int`, *optional*): end after so many.
        repeat, shuffle_buffer_size, seed: as in [`PackedStream`].
    """

    def __init__(
        self,
        tokens: Iterable[Mapping[str, Any]],
        max_documents: int | None = None,
        repeat: bool = False,
        shuffle_buffer_size: int = 0,
        seed: int = 0,
    ) -> None:
        self.documents = _DocumentStream(tokens, 2, repeat, shuffle_buffer_size, seed)
        self.max_documents = max_documents

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for ids in islice(self.documents, self.max_documents):
            yield {"input_ids": torch.tensor(ids, dtype=torch.long)}


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
