"""The texts of benchmarks/thinking.py: what is trained on, what is tuned on, what is tested on. Not a script.

Nothing is tested on that was trained or tuned on. Every file is one of those described in the README of the folder
with the data.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ebt_transformers.assets.build_tokenizer import build_tokenizer
from ebt_transformers.training.data import PackedBlocks, encode


HELD_OUT = 20  # one story of so many is for tuning: TinyStories has no other split to tune on
TUNING_CHARACTERS = 30_000  # of every source, at most: the loss on them picks the number of steps, over and over
VALIDATION = "validation"
END_OF_STORY = "<|endoftext|>"


# ---- reading files ---------------------------------------------------------------------------------------------


def _brown(path: Path) -> list[str]:
    """Texts are parted by an empty line."""
    return path.read_text(encoding="utf-8").split("\n\n")


def _articles(path: Path) -> list[str]:
    """An article begins with a heading of one equals sign."""
    return re.split(r"(?m)^(?= = [^=\n]+ = $)", path.read_text(encoding="utf-8"))


def _stories(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split(END_OF_STORY)


def _bible(path: Path) -> list[str]:
    """A document for each book, a verse a line."""
    books: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        place, _, verse = line.partition("\t")
        books.setdefault(place.rpartition(" ")[0], []).append(verse)
    return ["\n".join(verses) for verses in books.values()]


def _word_problems(path: Path) -> list[str]:
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [f"{row['question']}\n{row['answer']}" for row in rows]


def _paragraphs_with_question(path: Path) -> list[str]:
    """A paragraph is taken once, with its first question: it is the same text for all of them."""
    from pyarrow.parquet import read_table

    first: dict[str, dict] = {}
    for row in read_table(path, columns=["context", "question", "answers"]).to_pylist():
        first.setdefault(row["context"], row)
    return [f"{text}\n{row['question']}\n{row['answers']['text'][0]}" for text, row in first.items()]


def _right_choices(path: Path) -> list[str]:
    examples = json.loads(path.read_text(encoding="utf-8"))["examples"]
    return [f"{row['input']} {max(row['target_scores'], key=row['target_scores'].get)}" for row in examples]


@dataclass(frozen=True)
class Source:
    """
    A file of documents.

    Args:
        file (`str`): in the folder with the data.
        read (`Callable`): from a path to documents.
        inside (`bool`, *optional*, defaults to `True`): whether it is of the kind that was trained on.
    """

    file: str
    read: Callable[[Path], list[str]]
    inside: bool = True

    def documents(self, data: Path) -> list[str]:
        """
        Its documents, without white space at both ends, none of them empty.

        Args:
            data (`Path`): the folder with the data.

        Raises:
            FileNotFoundError: if the file is not there.
        """
        path = data / self.file
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no file {path}. --data is the folder with it; its README says what every file is and where "
                "it comes from."
            )
        return [text for text in map(str.strip, self.read(path)) if text]


TRAINING: dict[str, Source] = {
    "brown": Source("text/brown/train.txt", _brown),
    "wikitext": Source("text/wikitext103_part/wiki.train.part.tokens", _articles),
    "stories": Source("text/tinystories_part/train.txt", _stories),
    "kjv": Source("text/kjv/kjv.tsv", _bible),
}
DEFAULT_TRAINING = ("brown", "wikitext", "stories")
TUNING: dict[str, Source] = {
    "brown": Source("text/brown/valid.txt", _brown),
    "wikitext": Source("text/wikitext103_part/wiki.valid.tokens", _articles),
}
TESTS: dict[str, Source] = {
    "wikitext": Source("text/wikitext103_part/wiki.test.tokens", _articles),
    "brown": Source("text/brown/test.txt", _brown),
    "stories": Source("text/tinystories_part/valid.txt", _stories),
    "gsm8k": Source("qa/gsm8k/test.jsonl", _word_problems, inside=False),
    "squad": Source("qa/squad/dev_v1.1.parquet", _paragraphs_with_question, inside=False),
    "dyck": Source("qa/bigbench/dyck_languages.json", _right_choices, inside=False),
    "math": Source("qa/bigbench/elementary_math_qa_question_only.json", _right_choices, inside=False),
}
INSIDE = tuple(name for name, source in TESTS.items() if source.inside)
OUTSIDE = tuple(name for name, source in TESTS.items() if not source.inside)


# ---- what is trained and tuned on ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """
    The text of all runs, on disk.

    Args:
        train, validation (`Path`): JSON lines with a document as `text` each.
        tokenizer (`Path`): the folder of the tokenizer, which learned from the training text.
        fingerprint (`str`): changes with any of them.
    """

    train: Path
    validation: Path
    tokenizer: Path
    fingerprint: str


def _beginning(documents: Sequence[str], characters: int) -> Iterator[str]:
    """The first so many characters, in documents."""
    for text in documents:
        if characters <= 0:
            return
        yield text[:characters]
        characters -= len(text)


def tuning_documents(data: Path, validation: Path | None = None) -> list[str]:
    """
    The documents to pick a number of steps on.

    Args:
        data (`Path`): the folder with the data.
        validation (`Path`, *optional*): as [`prepare_texts`] wrote it; without it, those for models that were trained
            elsewhere: the beginnings of the validation parts of Brown and WikiText.

    Raises:
        FileNotFoundError: for a file that is not there.
    """
    if validation is not None:
        return [json.loads(line)["text"] for line in validation.read_text(encoding="utf-8").splitlines()]
    return [text for source in TUNING.values() for text in _beginning(source.documents(data), TUNING_CHARACTERS)]


def _write(path: Path, documents: Sequence[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")


def _fingerprint(paths: Sequence[Path]) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]


def prepare_texts(data: Path, folder: Path, names: Sequence[str], vocab_size: int) -> Texts:
    """
    Writes the text of all runs and trains its tokenizer, or takes what an earlier call wrote.

    Args:
        data (`Path`): the folder with the data.
        folder (`Path`): where to write; a folder in it belongs to these names and this vocabulary.
        names (sequence of `str`): what to train on, of `TRAINING`.
        vocab_size (`int`): tokens of the byte-level tokenizer.

    Raises:
        FileNotFoundError: for a file that is not there.
        ValueError: if the text is too short for so many tokens.
    """
    own = folder / "-".join(["texts", *sorted(names), str(vocab_size)])
    train, validation, tokenizer = own / "train.jsonl", own / "validation.jsonl", own / "tokenizer"
    done = own / "done.json"  # written last
    if not done.is_file():
        own.mkdir(parents=True, exist_ok=True)
        learned, tuned = [], []
        for name in tqdm(sorted(names), desc="reading the training text"):
            documents = TRAINING[name].documents(data)
            if name in TUNING:
                tuned += _beginning(TUNING[name].documents(data), TUNING_CHARACTERS)
            elif name == "stories":
                tuned += _beginning(documents[HELD_OUT - 1 :: HELD_OUT], TUNING_CHARACTERS)
                documents = [text for number, text in enumerate(documents, start=1) if number % HELD_OUT]
            learned += documents
        if not tuned:  # only what has no part for it
            tuned = [learned.pop()]
        _write(train, learned)
        _write(validation, tuned)
        print(f"Training a tokenizer of {vocab_size} tokens.")
        build_tokenizer("\n".join(learned), vocab_size).save_pretrained(tokenizer)
        done.write_text(json.dumps({"characters": sum(map(len, learned)), "documents": len(learned)}) + "\n")
    return Texts(train, validation, tokenizer, _fingerprint([train, validation, tokenizer / "tokenizer.json"]))


# ---- what is tested on -----------------------------------------------------------------------------------------


def blocks_of(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, block_size: int, tokens: int, name: str
) -> Tensor:
    """
    Blocks cut as in training (documents joined, each ended by eos), evenly spread over all there are.

    Args:
        documents (sequence of `str`): all texts of a set.
        tokenizer (`PreTrainedTokenizerBase`): cuts them into tokens.
        block_size (`int`): tokens of a block; all but the first are predicted.
        tokens (`int`): of all blocks together, rounded up to whole blocks, as far as the set goes.
        name (`str`): of the set, for the message.

    Returns:
        `torch.LongTensor` of shape `(blocks, block_size)`.

    Raises:
        ValueError: if the set does not fill one block.
    """
    packed = PackedBlocks(encode(documents, tokenizer, eos=True, max_length=None), block_size)
    if packed.num_tokens < block_size:
        raise ValueError(f"The set {name} has {packed.num_tokens} tokens: too few for a block of {block_size}.")
    count = min(math.ceil(tokens / block_size), len(packed))
    return torch.stack([packed[index * len(packed) // count]["input_ids"] for index in range(count)])


def load_tests(
    data: Path, tokenizer: PreTrainedTokenizerBase, block_size: int, tokens: int, validation: Path | None
) -> dict[str, Tensor]:
    """
    All test sets, and under the name `"validation"` the text to pick the number of steps on.

    Args:
        data (`Path`): the folder with the data.
        tokenizer, block_size, tokens: as in [`blocks_of`].
        validation (`Path`, *optional*): as in [`tuning_documents`].

    Returns:
        Blocks `(blocks, block_size)` by name.

    Raises:
        FileNotFoundError: for a file that is not there.
        ValueError: for a set that does not fill one block.
    """
    texts = {name: source.documents(data) for name, source in TESTS.items()}
    texts[VALIDATION] = tuning_documents(data, validation)
    return {
        name: blocks_of(documents, tokenizer, block_size, tokens, name)
        for name, documents in tqdm(texts.items(), desc="reading the test sets")
    }


__all__ = [
    "DEFAULT_TRAINING",
    "INSIDE",
    "OUTSIDE",
    "TESTS",
    "TRAINING",
    "VALIDATION",
    "Source",
    "Texts",
    "blocks_of",
    "load_tests",
    "prepare_texts",
    "tuning_documents",
]
