"""The lm-evaluation-harness on an Energy-Based Transformer, by number of thinking steps, and on its twin.

    python benchmarks/harness.py --twin runs/tiny_twin --data data
    python benchmarks/harness.py --ebt runs/mine --tasks ebt_shakespeare --limit 20

lm_eval is used as it is: its model `hf`, given `thinking_steps` like any other argument of a model. The tasks are
those of `benchmarks/lm_eval_tasks`. Rows are written to a file as they are measured; the same command continues where
it was interrupted.
"""

import argparse
import hashlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import lm_eval
from common import Results, add_common_options, command_line, machine_settings, report
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import ebt_transformers  # noqa: F401  the Auto classes, which lm_eval asks, know our models
from ebt_transformers.assets import checkpoint_path
from ebt_transformers.reporting import of_steps, table


NAME = "harness"
TASKS = Path(__file__).resolve().parent / "lm_eval_tasks"
HEADER = ("task", "measure", "documents", "chance")
TWIN = "twin"
BITS_PER_NAT = 1 / math.log(2)

# amount and weight of one document; a result is the sum of the amounts over that of the weights
Value = tuple[float, float]


class Tempered(HFLM):
    """lm_eval's model with its logits divided by a temperature: the same order of tokens, less or more sure of it."""

    temperature = 1.0

    def _model_call(self, *args: Any, **kwargs: Any) -> Any:
        return super()._model_call(*args, **kwargs) / self.temperature


@dataclass(frozen=True)
class Measure:
    """
    One number of a task.

    Args:
        task, title (`str`): whose it is, and what it is called.
        value (`Callable`): amount and weight of a document, of what lm_eval logs about it.
        chance (`float`, *optional*): the result of guessing.
        unit (`float`, *optional*, defaults to 1.0): by which the ratio is multiplied.
    """

    task: str
    title: str
    value: Callable[[dict[str, Any]], Value]
    chance: float | None = None
    unit: float = 1.0


def _of_text(name: str) -> Callable[[dict[str, Any]], Value]:
    return lambda sample: (-sample[name][0], sample[name][1])


MEASURES = (
    Measure("ebt_shakespeare", "bits per byte", _of_text("bits_per_byte"), unit=BITS_PER_NAT),
    Measure("ebt_lambada_text", "bits per byte", _of_text("bits_per_byte"), unit=BITS_PER_NAT),
    Measure("ebt_lambada", "nats per last word", lambda sample: (-sample["perplexity"], 1.0)),
    Measure("ebt_lambada", "accuracy", lambda sample: (float(sample["acc"]), 1.0)),
    Measure("ebt_elementary_math", "accuracy", lambda sample: (float(sample["acc"]), 1.0), chance=1 / 5),
    Measure("ebt_elementary_math", "accuracy per byte", lambda sample: (float(sample["acc_norm"]), 1.0), chance=1 / 5),
    Measure("ebt_dyck_languages", "accuracy", lambda sample: (float(sample["acc"]), 1.0), chance=1 / 84),
    Measure("ebt_dyck_languages", "accuracy per byte", lambda sample: (float(sample["acc_norm"]), 1.0), chance=1 / 84),
)
ALL_TASKS = tuple(dict.fromkeys(measure.task for measure in MEASURES))


def weighted_mean(values: Sequence[Value]) -> tuple[float, float]:
    """The ratio of the sums of amounts and weights, and its standard error over documents."""
    count, weights = len(values), sum(weight for _, weight in values)
    mean = sum(amount for amount, _ in values) / weights
    if count < 2:
        return mean, math.nan
    squares = sum((amount - mean * weight) ** 2 for amount, weight in values)
    return mean, math.sqrt(squares * count / (count - 1)) / weights


def difference(values: Sequence[Value], others: Sequence[Value]) -> tuple[float, float]:
    """How much more the first have than the second on the same documents, and the standard error of that."""
    return weighted_mean([(a - b, weight) for (a, weight), (b, _) in zip(values, others, strict=True)])


# ---- measuring -------------------------------------------------------------------------------------------------


def fingerprint(folder: Path) -> str:
    """Tells the weights of a checkpoint from others."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def limit_of(task: str, limits: Sequence[str]) -> int | None:
    """The most documents of a task: `--limit 100 ebt_dyck_languages=10` says it for all, and for one of them."""
    found = None
    for limit in limits:
        name, _, count = limit.rpartition("=")
        if name and name not in ALL_TASKS:
            raise ValueError(f"Unknown task {name!r} in --limit. Allowed: {', '.join(ALL_TASKS)}.")
        if not count.isdigit() or int(count) < 1:
            raise ValueError(f"--limit must be a number of at least 1, or TASK=NUMBER, got {limit!r}.")
        if name in ("", task):
            found = int(count)
    return found


def measure_task(model: HFLM, task: str, limit: int | None, tasks: TaskManager) -> dict[str, Any]:
    """What lm_eval finds, and the values of every document."""
    found = lm_eval.simple_evaluate(
        model=model, tasks=[task], limit=limit, task_manager=tasks, log_samples=True, bootstrap_iters=0
    )
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    harness = {name.partition(",")[0]: value for name, value in found["results"][task].items() if "none" in name}
    return {
        "harness": {name: value for name, value in harness.items() if isinstance(value, float)},
        "values": {
            measure.title: [[round(part, 4) for part in measure.value(sample)] for sample in samples]
            for measure in MEASURES
            if measure.task == task
        },
    }


def load(folder: Path, temperature: float, options: argparse.Namespace, **thinking: int) -> HFLM:
    """A checkpoint as lm_eval's model."""
    arguments = {"pretrained": str(folder), "device": options.device, "batch_size": options.batch_size, **thinking}
    if temperature == 1:
        return HFLM(**arguments)
    model = Tempered(**arguments)
    model.temperature = temperature
    return model


def measure_all(results: Results, options: argparse.Namespace) -> dict[str, dict[str, dict[str, Any]]]:
    """Rows by column and task; measures what the results lack."""
    tasks = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"data": options.data})
    models = {of_steps(count): (options.ebt, {"thinking_steps": count}) for count in options.steps}
    if options.twin is not None:
        models[TWIN] = (options.twin, {})
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for (name, (folder, thinking)), temperature in product(models.items(), options.temperatures):
        column = name if temperature == 1 else f"{name}, T={temperature:g}"
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no checkpoint folder {folder}.")
        checkpoint, model = fingerprint(folder), None
        for task in options.tasks:
            key = {"column": column, "checkpoint": checkpoint, "task": task, "limit": limit_of(task, options.limit)}
            if results.find(**key) is None:
                model = model or load(folder, temperature, options, **thinking)
                results.append({**key, **measure_task(model, task, key["limit"], tasks)})
            rows.setdefault(column, {})[task] = results.find(**key) or {}
    return rows


# ---- reporting -------------------------------------------------------------------------------------------------


def _cell(mean: float, error: float, signed: bool = False) -> str:
    return f"{mean:{'+' if signed else ''}.3f} ± {error:.3f}"


def result_rows(rows: dict[str, dict[str, dict[str, Any]]], measures: Sequence[Measure]) -> list[list[str]]:
    """A row for every measure, a column for every model."""
    lines = []
    for measure in measures:
        values = [rows[column][measure.task]["values"][measure.title] for column in rows]
        cells = [_cell(*(measure.unit * part for part in weighted_mean(found))) for found in values]
        chance = "" if measure.chance is None else f"{measure.chance:.3f}"
        lines.append([measure.task, measure.title, str(len(values[0])), chance, *cells])
    return lines


def partners(columns: Sequence[str], reference: str) -> dict[str, str]:
    """What to subtract from every column: the reference at the same temperature."""
    found = {}
    for column in columns:
        name, comma, temperature = column.partition(", ")
        if name != reference and f"{reference}{comma}{temperature}" in columns:
            found[column] = f"{reference}{comma}{temperature}"
    return found


def difference_rows(
    rows: dict[str, dict[str, dict[str, Any]]], measures: Sequence[Measure], pairs: dict[str, str]
) -> list[list[str]]:
    """How much more every column has than its partner on the same documents."""
    lines = []
    for measure in measures:
        values = {column: rows[column][measure.task]["values"][measure.title] for column in rows}
        found = [difference(values[column], values[partner]) for column, partner in pairs.items()]
        lines.append(
            [measure.task, measure.title, *(_cell(*(measure.unit * x for x in pair), True) for pair in found)]
        )
    return lines


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser, "lm_eval", text_models=False)
    parser.add_argument("--ebt", type=Path, default=checkpoint_path(), help="a checkpoint (default: the shipped one)")
    parser.add_argument("--twin", type=Path, help="an ordinary language model to compare with")
    parser.add_argument("--data", default="data", help="folder with lambada/ and bigbench/")
    parser.add_argument("--tasks", nargs="+", choices=ALL_TASKS, default=list(ALL_TASKS), help="default: all")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8], help="thinking steps")
    parser.add_argument(
        "--temperatures",
        type=float,
        nargs="+",
        default=[1.0],
        help="divide the logits by this, each in a column of its own (default: 1)",
    )
    parser.add_argument("--limit", nargs="+", default=[], help="the first so many documents: N, or TASK=N, or both")
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args(argv)
    if min(options.temperatures) <= 0:
        parser.error(f"--temperatures must be above 0, got {min(options.temperatures):g}")
    return options


def main(argv: Sequence[str] | None = None) -> str:
    """Measures, prints the tables and writes them down."""
    options = parse(argv)
    settings = machine_settings(options)
    settings["versions"] = {**settings["versions"], "lm_eval": lm_eval.__version__}
    results = Results(options.results, settings, options.fresh)
    rows = measure_all(results, options)
    measures = [measure for measure in MEASURES if measure.task in options.tasks]
    more = []
    for reference in (TWIN, of_steps(options.steps[0])):
        pairs = partners(list(rows), reference)
        if pairs:
            lines = difference_rows(rows, measures, pairs)
            more += [f"## Less {reference}, on the same documents", table(("task", "measure", *pairs), lines)]
    return report(
        results,
        "lm-evaluation-harness",
        command_line(NAME, sys.argv[1:] if argv is None else argv),
        (*HEADER, *rows),
        result_rows(rows, measures),
        "The tasks of `benchmarks/lm_eval_tasks`, zero-shot, by lm_eval's own model `hf`. Columns: thinking steps of "
        "the EBT, and its twin, which has none. Mean ± standard error over the first documents of each task. Lower is "
        "better for bits per byte and nats, higher for accuracy.",
        seed="none; nothing is drawn at random",
        more=more,
    )


if __name__ == "__main__":
    main()
