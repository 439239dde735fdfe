"""The text of `ebt train clm`: its options, and from them the rows for the Trainer."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .data_arguments import SplitArguments, check_percentage, hold_out_beginning, wanted_splits
from .script import say


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_BLOCK_SIZE = 256  # the paper's context length
DEFAULT_VALIDATION_PERCENT = 5.0


@dataclass
class DataArguments(SplitArguments):
    """Which text, and how it is cut into rows."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "A Hub id, a local folder or file, or tiny_shakespeare (embedded; the default)."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    train_file: list[str] | None = field(
        default=None,
        metadata={"help": "Training file(s) or URLs: .txt, .jsonl, .json, .csv or .parquet; patterns allowed."},
    )
    validation_file: list[str] | None = field(default=None, metadata={"help": "Validation file(s)."})
    test_file: list[str] | None = field(default=None, metadata={"help": "Test file(s)."})
    text_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with the text. Default: 'text', conversations in 'messages' (as the tokenizer's chat "
            "template writes them), or the only one."
        },
    )
    text_unit: str | None = field(
        default=None,
        metadata={
            "help": "What one document of a .txt file is: document (the file; default), paragraph (default with "
            "--no_packing) or line."
        },
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={
            "help": "Tokenizer: a folder, a Hub id, or tiny_shakespeare (embedded; the default for that text). "
            "Default: that of --model_name_or_path."
        },
    )
    block_size: int | None = field(
        default=None, metadata={"help": f"Tokens per row. Default: {DEFAULT_BLOCK_SIZE}, or what the model takes."}
    )
    packing: bool = field(
        default=True,
        metadata={
            "help": "Join all documents (each ended by eos) and cut them into blocks. --no_packing: the paper's way, "
            "one row per document, its first block_size + 1 tokens, padded; eos is never predicted."
        },
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on the first so many rows; of a stream: documents."}
    )
    max_eval_samples: int | None = field(
        default=None,
        metadata={
            "help": "Evaluate on the first so many rows. A stream without validation data gives its first so many "
            "documents to validation."
        },
    )
    validation_split_percentage: float | None = field(
        default=None,
        metadata={
            "help": f"Share of the training data held out when there is no validation data. Default: "
            f"{DEFAULT_VALIDATION_PERCENT:g}; 0 for none."
        },
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})


def load_documents(data: DataArguments) -> dict[str, Any]:
    """
    The documents of each split, with some for validation unless there shall be none.

    Raises:
        FileNotFoundError, ValueError: for data that cannot be read, saying why.
        SystemExit: for options that contradict each other.
    """
    from .data import EMBEDDED, load_files, load_named, split_off_validation

    options: dict[str, Any] = {
        "streaming": data.streaming,
        "text_unit": data.text_unit,
        "default_unit": "document" if data.packing else "paragraph",
    }
    if data.train_file is not None:
        named = {"train": data.train_file, "validation": data.validation_file, "test": data.test_file}
        documents = load_files({split: paths for split, paths in named.items() if paths}, **options)
    else:
        name, splits = data.dataset_name or EMBEDDED, wanted_splits(data)
        documents = load_named(name, data.dataset_config_name, splits=splits, **options)
    check_percentage(data, documents)
    if data.streaming:
        hold_out_beginning(data, documents, "documents")
        if data.max_train_samples is not None:
            documents["train"] = documents["train"].take(data.max_train_samples)
    if data.streaming or "validation" in documents:
        return documents
    train, percent = documents["train"], data.validation_split_percentage
    percent = DEFAULT_VALIDATION_PERCENT if percent is None else percent
    if percent != 0:
        say(f"No validation data: the last {percent:g} % of the training data are held out for it.")
        documents["train"], documents["validation"] = split_off_validation(train, percent, data.text_column)
    return documents


def text_rows(
    split: str, source: Any, data: DataArguments, tokenizer: "PreTrainedTokenizerBase", block_size: int, seed: int
) -> Any:
    """One split of documents as rows for the Trainer."""
    from .data import PackedBlocks, TruncatedDocuments, is_stream, tokenize

    training = split == "train"
    limit = data.max_train_samples if training else data.max_eval_samples
    tokens: Any = tokenize(
        source,
        tokenizer,
        text_column=data.text_column,
        eos=data.packing,
        max_length=None if data.packing else block_size + 1,
        num_workers=data.preprocessing_num_workers,
    )
    if is_stream(tokens):
        return _stream_rows(split, tokens, data, tokenizer, block_size, seed)
    if data.packing:
        options: dict[str, Any] = {
            "keep_remainder": not training,
            "pad_token_id": tokenizer.pad_token_id,
            "max_blocks": limit,
        }
        blocks = PackedBlocks(tokens, block_size, **options)
        rest = blocks.dropped_tokens
        lost = f"; the last {rest} tokens fill no block and are left out" if rest else ""
        say(f"{split}: {blocks.num_tokens:,} tokens, {len(blocks):,} blocks of {block_size}{lost}.")
        return blocks
    documents = TruncatedDocuments(tokens, limit)
    short = documents.dropped_documents
    lost = f"; {short} documents of fewer than 2 tokens predict nothing and are left out" if short else ""
    say(f"{split}: {len(documents):,} documents, at most {block_size + 1} tokens of each{lost}.")
    return documents


def _stream_rows(
    split: str, tokens: Any, data: DataArguments, tokenizer: "PreTrainedTokenizerBase", block_size: int, seed: int
) -> Any:
    """One split of a stream: without end for training, read once for evaluation if it is bounded."""
    from .data import PackedStream, TruncatedStream

    training = split == "train"
    limit = None if training else data.max_eval_samples
    order: dict[str, Any] = {"repeat": True, "shuffle_buffer_size": data.shuffle_buffer_size, "seed": seed}
    options = order if training else {}
    rows: Any
    if data.packing:
        rows = PackedStream(tokens, block_size, not training, tokenizer.pad_token_id, limit, **options)
    else:
        rows = TruncatedStream(tokens, limit, **options)
    if limit is None:
        say(
            f"{split}: a stream{'' if training else ', read anew at every evaluation (--max_eval_samples bounds it)'}."
        )
        return rows
    rows = list(rows)
    if not rows:
        raise ValueError(f"The {split} data of the stream hold no text. Check the files, the split or the column.")
    say(f"{split}: the first {len(rows):,} rows of the stream.")
    return rows


def describe_text(source: str, data: DataArguments, block_size: int) -> str:
    """The training data in words, for the model card."""
    layout = f"packed into blocks of {block_size} tokens"
    if not data.packing:
        layout = f"the first {block_size + 1} tokens of each document"
    return f"{source}, {layout}"


__all__ = ["DEFAULT_BLOCK_SIZE", "DataArguments", "describe_text", "load_documents", "text_rows"]
