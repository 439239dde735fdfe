"""
The data of the tasks in this folder, from files on disk; lm_eval calls these functions.

The files lie in a folder `data` of the working directory, or where the environment variable `EBT_DATA` or lm_eval's
`--metadata '{"data": "..."}'` says.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets


FOLDER, VARIABLE = "data", "EBT_DATA"
PASSAGE = 600  # characters of Shakespeare, which is about the 256 tokens of the shipped model's context
WHERE_FROM = "docs/results/lm_eval.md of ebt-transformers says where to get them"


def data_file(name: str, folder: str | None) -> Path:
    """A file of the data folder; raises with what to do if it is not there."""
    root = Path(folder or os.environ.get(VARIABLE) or FOLDER)
    path = root / name
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file {path}. Put the data into a folder {FOLDER!r} of the working directory, or name its "
            f'folder by the environment variable {VARIABLE} or --metadata \'{{"data": "..."}}\'; {WHERE_FROM}.'
        )
    return path


def _test_split(documents: Iterable[dict[str, Any]]) -> dict[str, datasets.Dataset]:
    return {"test": datasets.Dataset.from_list(list(documents))}


def lambada(data: str | None = None, **options: Any) -> dict[str, datasets.Dataset]:
    """Passages cut before their last word: `context` and `word`, with the whole as `text`."""
    with data_file("lambada/lambada_test.jsonl", data).open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    parts = [text.rpartition(" ") for text in texts]
    return _test_split(
        {"text": text, "context": before, "word": space + last}
        for text, (before, space, last) in zip(texts, parts, strict=True)
    )


def shakespeare(**options: Any) -> dict[str, datasets.Dataset]:
    """The test split of the package's own Tiny Shakespeare, as passages of whole speeches: `text`."""
    from ebt_transformers.assets import shakespeare_splits

    passages = [""]
    for speech in shakespeare_splits()["test"].strip().split("\n\n"):
        if passages[-1] and len(passages[-1]) + len(speech) > PASSAGE:
            passages.append("")
        passages[-1] += speech + "\n\n"
    return _test_split({"text": passage} for passage in passages)


def _multiple_choice(file: str) -> Callable[..., dict[str, datasets.Dataset]]:
    """Loads a task of BIG-bench in which exactly one of the choices is right."""

    def documents(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
        before, after = task.get("example_input_prefix", ""), task.get("example_output_prefix", "\nA: ")
        for example in task["examples"]:
            scores = example["target_scores"]
            question = task.get("task_prefix", "") + before + example["input"] + after.rstrip(" ")
            yield {"question": question, "choices": list(scores), "answer": list(scores.values()).index(1)}

    def load(data: str | None = None, **options: Any) -> dict[str, datasets.Dataset]:
        path = data_file(f"bigbench/{file}.json", data)
        return _test_split(documents(json.loads(path.read_text(encoding="utf-8"))))

    load.__doc__ = f"Questions with choices, from {file}.json."
    return load


dyck_languages = _multiple_choice("dyck_languages")
elementary_math = _multiple_choice("elementary_math_qa_question_only")
