"""One training step (forward and backward, no optimiser) of an EBT against its Transformer++ twin.

    python benchmarks/training_step.py --preset xxs --vocab-size 50277 --batch-sizes 4 --contexts 256 --threads 2
    python benchmarks/training_step.py --shapes xxs:50277 4xs:8192 --recipes s1 s2 --chunk-sizes auto 0

Time: both models take turns in one process, and the ratio is the median over the turns. It stands beside the ratio of
the operations that the two need, counted (benchmarks/floors.py). Memory: each model has a process of its own, and what
counts is the highest memory use while it trains (weights, gradients and activations), less what the process used
before the model was built. Random weights and tokens. Every combination of the options is a row. Rows are written to a
file as they are measured; the same command continues where it was interrupted.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import Results, add_common_options, alternate, command_line, machine_settings, report, timed
from floors import ebt_training, training_steps, twin_training
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.utils.logging import tqdm

from ebt_transformers import EBTConfig, EBTForCausalLM, transformer_pp_config
from ebt_transformers.configuration import PRESETS, RECIPES
from ebt_transformers.configuration.configuration_ebt import SECOND_ORDERS, STEP_CONDITIONINGS


NAME = "training_step"
MEMORY_STEPS = 2  # the second has the gradients of the first to hold
MEGABYTE = 2**20
# what a row is of, and how its columns are called
KEY = {
    "shape": "shape",
    "recipe": "recipe",
    "step_conditioning": "conditioning",
    "steps": "steps",
    "second_order": "second order",
    "chunk_size": "chunk",
    "precision": "precision",
    "batch": "batch",
    "context": "context",
}
OF_TWIN = ("shape", "precision", "batch", "context")  # the part of it that the twin depends on
ALWAYS = ("batch", "context")  # columns also where they are the same in all rows
WHOLE_GRAPH = 0  # the chunk size that leaves everything to autograd


# ---- what is measured ------------------------------------------------------------------------------------------


def shape_of(text: str) -> str:
    """
    A shape from the command line, `PRESET:VOCABULARY`.

    Raises:
        argparse.ArgumentTypeError: for an unknown preset, or a vocabulary that is no number of at least 1.
    """
    preset, _, vocabulary = text.partition(":")
    if preset not in PRESETS or not vocabulary.isdecimal() or int(vocabulary) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no PRESET:VOCABULARY, as in xxs:50277. Presets: {', '.join(PRESETS)}; a vocabulary has at "
            "least 1 token."
        )
    return f"{preset}:{int(vocabulary)}"


def chunk_size_of(text: str) -> int | str:
    """
    A chunk size from the command line.

    Raises:
        argparse.ArgumentTypeError: for what is neither `auto` nor a number of at least 0.
    """
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number of candidates (0: all at once)")
    return text if text == "auto" else int(text)


def config_of(key: dict[str, Any]) -> EBTConfig:
    """The EBT of a row; without `steps` in the key it takes as many as its recipe says."""
    preset, _, vocabulary = key["shape"].partition(":")
    return EBTConfig.from_preset(
        preset,
        recipe=key["recipe"],
        vocab_size=int(vocabulary),
        max_position_embeddings=key["context"],
        step_conditioning=key["step_conditioning"],
        second_order=key["second_order"],
        training_chunk_size=None if key["chunk_size"] == "auto" else key["chunk_size"],
        random_steps=None,  # every step of training costs the same
        **({"thinking_steps": key["steps"]} if "steps" in key else {}),
    )


def keys_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What is to be measured: every combination of the options, but whole graphs by double backward only."""
    found = []
    for shape, recipe, conditioning, second_order, chunk, batch, context in product(
        options.shapes or [f"{options.preset}:{options.vocab_size}"],
        options.recipes,
        options.step_conditionings,
        options.second_orders,
        options.chunk_sizes,
        options.batch_sizes,
        options.contexts,
    ):
        if chunk == WHOLE_GRAPH and second_order != "double_backward":
            continue
        key = {"shape": shape, "recipe": recipe, "step_conditioning": conditioning, "second_order": second_order}
        key |= {"chunk_size": chunk, "precision": options.precision, "batch": batch, "context": context}
        found.append({**key, "steps": options.steps or training_steps(config_of(key))})
    return found


def build(name: str, key: dict[str, Any], options: argparse.Namespace) -> PreTrainedModel:
    """One of the two models, in training mode."""
    torch.manual_seed(options.seed)
    config = config_of(key)
    model = EBTForCausalLM(config) if name == "ebt" else LlamaForCausalLM(transformer_pp_config(config))
    return model.to(options.device).train()


def step_of(model: PreTrainedModel, key: dict[str, Any], options: argparse.Namespace) -> Callable[[], None]:
    """A function that does one step."""
    generator = torch.Generator().manual_seed(options.seed)
    size = (key["batch"], key["context"])
    ids = torch.randint(0, model.config.vocab_size, size, generator=generator).to(options.device)
    kind, low = torch.device(options.device).type, key["precision"] == "bfloat16"

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=low):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()

    return step


# ---- measuring -------------------------------------------------------------------------------------------------


def peak_resident() -> int:
    """The most memory this process ever held, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux: what getrusage says there includes the process that started this one
        fields = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_memory(options: argparse.Namespace) -> float:
    """Highest memory use of the model `options.memory_of`, in MB; to be called in a process of its own."""
    (key,) = keys_of(options)
    on_cuda = torch.device(options.device).type == "cuda"
    before = 0
    if not on_cuda:
        import psutil

        before = psutil.Process().memory_info().rss
    step = step_of(build(options.memory_of, key, options), key, options)
    for _ in range(MEMORY_STEPS):
        step()
    peak = torch.cuda.max_memory_allocated(options.device) if on_cuda else peak_resident()
    return (peak - before) / MEGABYTE


def memory_in_subprocess(name: str, key: dict[str, Any], options: argparse.Namespace) -> float:
    """[`peak_memory`] of one model, measured in a new process."""
    command = [sys.executable, __file__, "--memory-of", name]
    for option, field in (
        ("shapes", "shape"),
        ("recipes", "recipe"),
        ("step-conditionings", "step_conditioning"),
        ("steps", "steps"),
        ("second-orders", "second_order"),
        ("chunk-sizes", "chunk_size"),
        ("precision", "precision"),
        ("batch-sizes", "batch"),
        ("contexts", "context"),
    ):
        command += [f"--{option}", str(key[field])]
    for option in ("threads", "device", "seed"):
        command += [f"--{option}", str(getattr(options, option))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"Measuring the memory of {name} failed:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def measure(key: dict[str, Any], options: argparse.Namespace, twin_megabytes: float | None = None) -> dict[str, Any]:
    """One row; `twin_megabytes` where another EBT of this twin has been measured already."""
    steps = {name: step_of(build(name, key, options), key, options) for name in ("ebt", "twin")}
    ebt, twin, ratio = alternate(
        lambda: [timed(steps["ebt"], options.device)],
        lambda: [timed(steps["twin"], options.device)],
        options.repeats,
    )
    steps.clear()
    if twin_megabytes is None:
        twin_megabytes = memory_in_subprocess("twin", key, options)
    memory = {"ebt_megabytes": memory_in_subprocess("ebt", key, options), "twin_megabytes": twin_megabytes}
    return {**key, "ebt_seconds": ebt, "twin_seconds": twin, "ratio": ratio, **memory}


def measure_all(results: Results, keys: Sequence[dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of all keys; measures what the results lack."""
    missing = [key for key in keys if results.find(**key) is None]
    for key in tqdm(missing, desc=f"{len(keys) - len(missing)} rows found, measuring", unit="row"):
        relative = results.find(**{name: key[name] for name in OF_TWIN})
        results.append(measure(key, options, None if relative is None else relative["twin_megabytes"]))
    return [results.find(**key) or {} for key in keys]


# ---- reporting -------------------------------------------------------------------------------------------------


def cells_of(row: dict[str, Any], on_cuda: bool) -> dict[str, str]:
    """What was measured of a row, by column."""
    config, tokens = config_of(row), row["batch"] * row["context"]
    work = {"EBT": ebt_training(config, row["context"]).total, "twin": twin_training(config, row["context"]).total}
    seconds = {"EBT": row["ebt_seconds"], "twin": row["twin_seconds"]}
    floor = work["EBT"] / work["twin"]
    cells = {f"{name} s": f"{seconds[name]:.3f}" for name in seconds}
    cells["time x twin"] = f"{row['ratio']:.2f}"
    cells["EBT tokens/s"] = f"{tokens / seconds['EBT']:.0f}"
    cells["floor x twin"] = f"{floor:.2f}"
    cells["time / floor"] = f"{row['ratio'] / floor:.2f}"
    if on_cuda:  # a multiply-add is two operations
        cells |= {f"{name} TFLOP/s": f"{2 * work[name] * tokens / seconds[name] / 1e12:.1f}" for name in work}
    cells |= {"EBT MB": f"{row['ebt_megabytes']:.0f}", "twin MB": f"{row['twin_megabytes']:.0f}"}
    cells["memory x twin"] = f"{row['ebt_megabytes'] / row['twin_megabytes']:.2f}"
    return cells


def varying(keys: Sequence[dict[str, Any]]) -> list[str]:
    """What of the keys is a column: what differs between them."""
    return [name for name in KEY if name in ALWAYS or len({key[name] for key in keys}) > 1]


def memory_slopes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """For every setting that was measured with several batch sizes: what each row of a batch adds to the memory."""
    columns = [name for name in varying(rows) if name != "batch"]
    settings: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        settings.setdefault(tuple(row[name] for name in columns), []).append(row)
    lines = []
    for setting, found in settings.items():
        batches = [row["batch"] for row in found]
        if len(set(batches)) < 2:
            continue
        ebt, twin = (
            statistics.linear_regression(batches, [row[f"{name}_megabytes"] for row in found]).slope
            for name in ("ebt", "twin")
        )
        named = ", ".join(f"{KEY[name]} {value}" for name, value in zip(columns, setting, strict=True))
        ratio = f"{ebt / twin:.2f} times" if twin > 0 else "no ratio"
        lines.append(f"- memory per row of a batch, {named}: EBT {ebt:.1f} MB, twin {twin:.1f} MB, {ratio}")
    return lines


def notes_of(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """What stands before the table."""
    same = [f"{KEY[name]} {rows[0][name]}" for name in KEY if name not in columns]
    lines = [f"- all rows: {', '.join(same)}"] if same else []
    lines.append(
        "- floor x twin: the operations that the EBT's step needs, counted, over those that its twin's does "
        "(`benchmarks/floors.py`); time / floor: the measured ratio over the counted one"
    )
    if any(RECIPES[row["recipe"]].get("random_steps") for row in rows):
        lines.append(
            "- recipe s2 draws its number of steps for each batch; here it is always the same (`random_steps=None`), "
            "so that every step costs the same"
        )
    if any(row["chunk_size"] == WHOLE_GRAPH for row in rows):
        lines.append("- chunk 0: all candidates at once, their gradients by autograd (double backward only)")
    return "\n".join(lines + memory_slopes(rows))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser, NAME)
    parser.add_argument(
        "--shapes",
        type=shape_of,
        nargs="+",
        metavar="PRESET:VOCABULARY",
        help="sizes and vocabularies, instead of --preset and --vocab-size",
    )
    parser.add_argument("--recipes", nargs="+", choices=("s1", "s2"), default=["s1"])
    parser.add_argument("--step-conditionings", nargs="+", choices=STEP_CONDITIONINGS, default=["time_embed"])
    parser.add_argument("--second-orders", nargs="+", choices=SECOND_ORDERS, default=["double_backward"])
    parser.add_argument(
        "--chunk-sizes",
        type=chunk_size_of,
        nargs="+",
        default=["auto"],
        help="candidates at a time; auto: the config's default, 0: all at once, their gradients by autograd",
    )
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="bfloat16: by autocast; weights and states stay in float32",
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4])
    parser.add_argument("--contexts", type=int, nargs="+", default=[256], help="tokens per row")
    parser.add_argument("--steps", type=int, help="thinking steps of the EBT (default: s1 2, s2 3)")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--memory-of", choices=("ebt", "twin"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    if not keys_of(options):
        parser.error("--chunk-sizes 0 takes --second-orders double_backward only")
    return options


def main(argv: Sequence[str] | None = None) -> str:
    """Runs the benchmark and returns its table."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parse(argv)
    if options.memory_of is not None:
        torch.set_num_threads(options.threads)
        print(json.dumps(peak_memory(options)))
        return ""

    machine = machine_settings(options)
    # the rows themselves say what shape they are of
    settings = {name: machine[name] for name in machine if name not in ("preset", "vocab_size")}
    results = Results(options.results, {**settings, "repeats": options.repeats}, options.fresh)
    rows = measure_all(results, keys_of(options), options)
    columns = varying(rows)
    cells = [cells_of(row, torch.device(options.device).type == "cuda") for row in rows]
    return report(
        results,
        "Training step",
        command_line(NAME, argv),
        [*(KEY[name] for name in columns), *cells[0]],
        [[*(str(row[name]) for name in columns), *own.values()] for row, own in zip(rows, cells, strict=True)],
        notes_of(rows, columns),
    )


if __name__ == "__main__":
    main()
