"""What the benchmarks share: resumable results, tables with their machine, command and versions, and alternating
timing. Not a script."""

import argparse
import json
import shlex
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ebt_transformers.reporting import environment, processor_name, table


RESULTS = Path(__file__).resolve().parent / "results"
VERSIONS = ("ebt_transformers", "python", "torch", "transformers", "processor", "cuda")


def add_common_options(parser: argparse.ArgumentParser, name: str, text_models: bool = True) -> None:
    """
    Options that every benchmark takes.

    Args:
        parser (`argparse.ArgumentParser`): gets them.
        name (`str`): that of the result files.
        text_models (`bool`, *optional*, defaults to `True`): also those of benchmarks that make random text models.
    """
    if text_models:
        parser.add_argument("--preset", default="xxs", help="size of both models, as in EBTConfig.from_preset")
        parser.add_argument("--vocab-size", type=int, default=50277)
        parser.add_argument("--seed", type=int, default=0, help="of the random weights and tokens")
    parser.add_argument("--threads", type=int, default=2, help="threads torch may use")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, default=RESULTS / f"{name}.jsonl", help="where rows are collected")
    parser.add_argument("--fresh", action="store_true", help="measure again what the results hold already")


class Results:
    """
    Rows of a benchmark in a file of JSON lines, written as they are measured.

    A row belongs to this run if all its settings are the same; others stay in the file and are left alone.

    Args:
        path (`Path`): the file; its folder is made.
        settings (`dict`): everything besides the row's own key that the numbers depend on.
        fresh (`bool`): whether rows of earlier runs count.
    """

    def __init__(self, path: Path, settings: dict[str, Any], fresh: bool = False) -> None:
        self.path = path
        self.settings = json.loads(json.dumps(settings))
        self.rows: list[dict[str, Any]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if text and not text.endswith("\n"):
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")
        if not fresh:
            for line in text.splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:  # a run was killed while writing its last line
                    continue
                if row.get("settings") == self.settings:
                    self.rows.append(row)

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The newest row with these values, if there is one."""
        for row in reversed(self.rows):
            if all(row.get(name) == value for name, value in key.items()):
                return row
        return None

    def append(self, row: dict[str, Any]) -> None:
        """Adds a row, on disk at once."""
        row = {**row, "settings": self.settings}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)


def machine_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What of the machine and the options the numbers of every benchmark depend on; sets the number of threads."""
    torch.set_num_threads(options.threads)
    facts = environment()
    versions = {name: facts[name] for name in VERSIONS}
    names = ("preset", "vocab_size", "threads", "device", "seed")
    return {**{name: getattr(options, name) for name in names if name in options}, "versions": versions}


def command_line(script: str, argv: Sequence[str]) -> str:
    """The command to repeat a run with."""
    return shlex.join(["python", f"benchmarks/{script}.py", *argv])


def report(
    results: Results,
    title: str,
    command: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: str,
    seed: str | None = None,
    more: Sequence[str] = (),
) -> str:
    """
    Prints a result as markdown, and writes it beside its rows.

    Args:
        results ([`Results`]): says what it was measured on, and where to write.
        title, command (`str`): the headline, and how to repeat the run.
        header, rows (sequences of `str`): the table.
        notes (`str`): stands before the table.
        seed (`str`, *optional*): instead of the settings' own.
        more (sequence of `str`, *optional*): parts that follow the table.
    """
    settings = results.settings
    versions = ", ".join(f"{name} {value}" for name, value in settings["versions"].items() if name != "processor")
    text = "\n".join(
        [
            f"# {title}",
            "",
            f"- machine: {settings['versions']['processor']}; device {settings['device']}, "
            f"{settings['threads']} threads",
            f"- versions: {versions}",
            f"- command: `{command}`",
            f"- seed: {settings['seed']}; random weights" if seed is None else f"- seed: {seed}",
            "",
            notes,
            "",
            table(header, rows),
            "",
            *(line for part in more for line in (part, "")),
        ]
    )
    results.path.with_suffix(".md").write_text(text, encoding="utf-8")
    print("\n" + text)
    return text


def synchronize(device: str) -> None:
    """Waits until the device has done what it was told."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], Any], device: str) -> float:
    """Seconds of one call."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def alternate(
    first: Callable[[], list[float]], second: Callable[[], list[float]], repeats: int
) -> tuple[float, float, float]:
    """
    Compares two kinds of work on a machine whose speed varies: they take turns, and each turn gives one ratio.

    Args:
        first, second (`Callable`): do the work once and return its timings.
        repeats (`int`): turns; one more goes before them, for warming up.

    Returns:
        Median seconds of the first, of the second, and the median over turns of their ratio.
    """
    turns = [(first(), second()) for _ in range(repeats + 1)][1:]
    ratios = [statistics.median(a) / statistics.median(b) for a, b in turns]
    of_first = statistics.median(value for turn in turns for value in turn[0])
    of_second = statistics.median(value for turn in turns for value in turn[1])
    return of_first, of_second, statistics.median(ratios)


__all__ = [
    "Results",
    "add_common_options",
    "alternate",
    "command_line",
    "machine_settings",
    "processor_name",
    "report",
    "synchronize",
    "timed",
]
