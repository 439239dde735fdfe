"""What each optimisation of the text model buys: it is switched off again, and everything else stays on.

    python benchmarks/optimisations.py --preset xxs --vocab-size 50277 --context 256 --batch-size 4 --threads 2
    python benchmarks/optimisations.py --only decoding --context 1024

Training: one step of recipe s1, forward and backward, no optimiser. Decoding: the time between two new tokens of one
text, greedily and with a cache. The same model goes with and without an optimisation in turns, and the ratio is the
median over the turns. Memory: a process of its own for either, and what counts is the highest memory use while it
trains, less what the process used before the model was built. Random weights and tokens. Rows are written to a file as
they are measured; the same command continues where it was interrupted.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from common import Results, add_common_options, alternate, command_line, machine_settings, report, timed
from generation import token_times
from torch import Tensor
from training_step import MEGABYTE, MEMORY_STEPS, build, config_of, peak_resident, step_of
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from ebt_transformers import EBTConfig, EBTForCausalLM
from ebt_transformers.modeling_ebt import candidates, descent, fused, learning, modeling_ebt
from ebt_transformers.reporting import table


NAME = "optimisations"
PARTS = {"training": "Training step", "decoding": "Decoding"}
STEPS = (2, 8)  # thinking steps of a decoded token
NEW_TOKENS = 8  # decoded tokens timed in a turn
NEVER = 2**62  # more numbers than are ever drawn at once
EVERYTHING = "everything"  # the memory of the model with all optimisations
CHUNK_ELSEWHERE = 8192  # candidates of a chunk on devices that `TRAINING_CHUNK_SIZES` does not name
COLUMNS = ("optimisation", "in its place")
TRAINING_COLUMNS = ("s with", "s without", "without / with", "MB with", "MB without")
DECODING_COLUMNS = ("steps", "ms with", "ms without", "without / with")


# ---- how to do without -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Optimisation:
    """
    An optimisation, and how to do without it.

    Args:
        name (`str`): what tables call it.
        instead (`str`): what happens without it.
        off (`Callable`): `(model) -> context manager` in which the model does without it.
        cpu_only (`bool`, *optional*, defaults to `False`): whether other devices never have it.
    """

    name: str
    instead: str
    off: Callable[[PreTrainedModel], AbstractContextManager[Any]]
    cpu_only: bool = False


def in_chunks_of(model: PreTrainedModel, size: int) -> AbstractContextManager[Any]:
    """Training takes `size` candidates at a time; with 0 it takes all, and autograd differentiates everything."""
    return patch.object(model.config, "training_chunk_size", size)


def by_plain_formulas(model: PreTrainedModel) -> AbstractContextManager[Any]:
    """Norms, rotations and softmaxes are their plain formulas, whose derivatives autograd finds."""
    return patch.object(fused, "has_closed_form", lambda tensor: False)


def drawn_in_one_piece(model: PreTrainedModel) -> AbstractContextManager[Any]:
    """All noise is drawn by one thread, as torch does: other numbers from the same seed."""
    return patch.object(descent, "NOISE_BLOCK", NEVER)


def mixed_by_products(model: PreTrainedModel) -> AbstractContextManager[Any]:
    """A few distributions are embedded by a matrix product, as many are."""
    return patch.object(candidates, "FEWER_ROWS", 0)


def rows_in_front(model: PreTrainedModel) -> AbstractContextManager[Any]:
    """A few gradients are projected by the product that many take, with the table behind."""
    return patch.object(candidates, "FEW_ROWS", 0)


class _UnknownStart(candidates.TextCandidates):
    """Candidates of which nobody says what they embed to at the start."""

    def __init__(self, table: Tensor, update_rule: str = "replace", first: Tensor | None = None) -> None:
        super().__init__(table, update_rule)


def start_embedded_anew(model: PreTrainedModel) -> AbstractContextManager[Any]:
    """Every token embeds the start of its descent. It is embedded for the text, too, but before the first token."""
    return patch.object(modeling_ebt, "TextCandidates", _UnknownStart)


def uncached(model: PreTrainedModel) -> AbstractContextManager[Any]:
    """Every token encodes its whole context."""
    return patch.object(model.generation_config, "use_cache", False)


TRAINING = {
    "chunks": Optimisation(
        "chunks, differentiated on the way", "all at once, by autograd", partial(in_chunks_of, size=0)
    ),
    "chunks-256": Optimisation("default chunks", "chunks of 256", partial(in_chunks_of, size=256)),
    "chunks-1024": Optimisation("default chunks", "chunks of 1024", partial(in_chunks_of, size=1024)),
    "closed-form": Optimisation("second derivatives in closed form", "by autograd", by_plain_formulas),
    "noise": Optimisation("noise drawn side by side", "by one thread", drawn_in_one_piece, cpu_only=True),
}
DECODING = {
    "bags": Optimisation("mixtures of the table as bags", "matrix products", mixed_by_products, cpu_only=True),
    "table-first": Optimisation("the table in front of few rows", "the rows in front", rows_in_front, cpu_only=True),
    "start": Optimisation("the start embedded once", "for every token", start_embedded_anew),
    "cache": Optimisation("the context once per text (cache)", "for every token", uncached),
}


# ---- what is measured ------------------------------------------------------------------------------------------


def training_key(options: argparse.Namespace) -> dict[str, Any]:
    """The training step that is measured, as a row of benchmarks/training_step.py."""
    return {
        "shape": f"{options.preset}:{options.vocab_size}",
        "recipe": "s1",
        "step_conditioning": "time_embed",
        "second_order": "double_backward",
        "chunk_size": "auto",
        "precision": "float32",
        "batch": options.batch_size,
        "context": options.context,
    }


def keys_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What is to be measured: every optimisation that the device has, decoding for every number of steps."""
    on_cpu = torch.device(options.device).type == "cpu"
    found: list[dict[str, Any]] = []
    if options.only != "decoding":
        size = {"batch": options.batch_size, "context": options.context}
        found += [
            {"part": "training", "off": name, **size} for name, own in TRAINING.items() if on_cpu or not own.cpu_only
        ]
    if options.only != "training":
        found += [
            {"part": "decoding", "off": name, "context": options.context, "steps": steps}
            for name, own in DECODING.items()
            for steps in STEPS
            if on_cpu or not own.cpu_only
        ]
    return found


def default_chunk(options: argparse.Namespace) -> int:
    """Candidates that training takes at a time on this device."""
    return modeling_ebt.TRAINING_CHUNK_SIZES.get(torch.device(options.device).type, CHUNK_ELSEWHERE)


def no_difference(options: argparse.Namespace) -> list[str]:
    """The rows of training that a step of this size leaves without a difference, as the table calls them."""
    size = (options.batch_size, options.context)
    blocks = list(learning.chunks(*size, default_chunk(options)))
    same = [f"chunks-{chunk}" for chunk in (256, 1024) if list(learning.chunks(*size, chunk)) == blocks]
    widest = max(len(range(size[0])[rows]) * len(range(size[1])[part]) for rows, part in blocks)
    if widest * options.vocab_size < 2 * descent.NOISE_BLOCK:
        same.append("noise")
    shown = [key["off"] for key in keys_of(options) if key["part"] == "training"]
    return [f"{TRAINING[name].name} ({TRAINING[name].instead})" for name in same if name in shown]


# ---- measuring -------------------------------------------------------------------------------------------------


def peak_memory(options: argparse.Namespace) -> float:
    """Highest memory use of training without `options.memory_of`, in MB; to be called in a process of its own."""
    on_cuda = torch.device(options.device).type == "cuda"
    before = 0
    if not on_cuda:
        import psutil

        before = psutil.Process().memory_info().rss
    key = training_key(options)
    model = build("ebt", key, options)
    step = step_of(model, key, options)
    with nullcontext() if options.memory_of == EVERYTHING else TRAINING[options.memory_of].off(model):
        for _ in range(MEMORY_STEPS):
            step()
    peak = torch.cuda.max_memory_allocated(options.device) if on_cuda else peak_resident()
    return (peak - before) / MEGABYTE


def memory_in_subprocess(off: str, options: argparse.Namespace) -> float:
    """[`peak_memory`] without one optimisation, or with [`EVERYTHING`], measured in a new process."""
    command = [sys.executable, __file__, "--memory-of", off]
    for option in ("preset", "vocab_size", "seed", "threads", "device", "context", "batch_size"):
        command += [f"--{option.replace('_', '-')}", str(getattr(options, option))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"Measuring the memory of {off} failed:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def in_turns(
    work: Callable[[], list[float]], own: Optimisation, model: PreTrainedModel, repeats: int
) -> dict[str, float]:
    """Seconds of the model's work with and without an optimisation, and how many times as long it takes without."""

    def without() -> list[float]:
        with own.off(model):
            return work()

    seconds, seconds_with, ratio = alternate(without, work, repeats)
    return {"seconds_with": seconds_with, "seconds_without": seconds, "ratio": ratio}


def training_model(options: argparse.Namespace) -> tuple[PreTrainedModel, Callable[[], list[float]]]:
    """The model in training mode, and a function that does a step and returns its seconds."""
    key = training_key(options)
    model = build("ebt", key, options)
    step = step_of(model, key, options)
    return model, lambda: [timed(step, options.device)]


def decoding_model(options: argparse.Namespace) -> tuple[PreTrainedModel, Callable[[int], list[float]]]:
    """The model in evaluation mode, and a function that decodes with so many steps and returns seconds of tokens."""
    torch.manual_seed(options.seed)
    size = {"vocab_size": options.vocab_size, "max_position_embeddings": options.context + NEW_TOKENS + 1}
    model = EBTForCausalLM(EBTConfig.from_preset(options.preset, **size)).to(options.device).eval()
    generator = torch.Generator().manual_seed(options.seed)
    prompt = torch.randint(0, options.vocab_size, (1, options.context), generator=generator).to(options.device)
    return model, lambda steps: token_times(model, prompt, NEW_TOKENS, thinking_steps=steps)


def measure_training(results: Results, keys: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """Adds rows of training. The memory with all optimisations is measured once."""
    model, step = training_model(options)
    for key in tqdm(keys, desc="Training", unit="row"):
        row = {**key, **in_turns(step, TRAINING[key["off"]], model, options.repeats)}
        relative = results.find(**{name: value for name, value in key.items() if name != "off"})
        known = None if relative is None else relative["megabytes_with"]
        row["megabytes_with"] = memory_in_subprocess(EVERYTHING, options) if known is None else known
        row["megabytes_without"] = memory_in_subprocess(key["off"], options)
        results.append(row)


def measure_decoding(results: Results, keys: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """Adds rows of decoding."""
    model, tokens = decoding_model(options)
    for key in tqdm(keys, desc="Decoding", unit="row"):
        work = partial(tokens, key["steps"])
        results.append({**key, **in_turns(work, DECODING[key["off"]], model, options.repeats)})


# ---- reporting -------------------------------------------------------------------------------------------------


def table_of(part: str, rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of a part's rows."""
    lines = []
    for row in rows:
        own = (TRAINING if part == "training" else DECODING)[row["off"]]
        unit, digits = (1, 3) if part == "training" else (1000, 2)
        cells = [f"{unit * row[f'seconds_{way}']:.{digits}f}" for way in ("with", "without")]
        cells.append(f"{row['ratio']:.2f}")
        if part == "training":
            cells += [f"{row[f'megabytes_{way}']:.0f}" for way in ("with", "without")]
        else:
            cells.insert(0, str(row["steps"]))
        lines.append([own.name, own.instead, *cells])
    return [*COLUMNS, *(TRAINING_COLUMNS if part == "training" else DECODING_COLUMNS)], lines


def notes_of(parts: Sequence[str], options: argparse.Namespace) -> str:
    """What stands before the tables."""
    lines = ["- every row switches one optimisation off and leaves all others on; without / with: above 1 it pays"]
    if "training" in parts:
        steps = config_of(training_key(options)).num_landscapes
        lines.append(
            f"- training: recipe s1, {steps} thinking steps, {options.batch_size} x {options.context} candidates; "
            f"default chunks: {default_chunk(options)} candidates"
        )
        if same := no_difference(options):
            lines.append(f"- a training step of this size does the same in both cases: {', '.join(same)}")
    if "decoding" in parts:
        lines.append(f"- decoding: context {options.context}, one text, greedily, ms per token")
    return "\n".join(lines)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser, NAME)
    parser.add_argument("--context", type=int, default=256, help="tokens of a row of training, and of the prompt")
    parser.add_argument("--batch-size", type=int, default=4, help="rows of a training step")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--only", choices=tuple(PARTS), help="one part (default: both)")
    parser.add_argument("--memory-of", choices=(EVERYTHING, *TRAINING), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    for name in ("context", "batch_size", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    return options


def main(argv: Sequence[str] | None = None) -> str:
    """Runs the benchmark and returns its tables."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parse(argv)
    if options.memory_of is not None:
        torch.set_num_threads(options.threads)
        print(json.dumps(peak_memory(options)))
        return ""

    settings = {**machine_settings(options), "repeats": options.repeats, "new_tokens": NEW_TOKENS}
    results = Results(options.results, settings, options.fresh)
    keys = keys_of(options)
    parts = [part for part in PARTS if options.only in (None, part)]
    for part, measure in (("training", measure_training), ("decoding", measure_decoding)):
        missing = [key for key in keys if key["part"] == part and results.find(**key) is None]
        if missing:
            measure(results, missing, options)

    tables = [
        (f"## {PARTS[part]}", *table_of(part, [results.find(**key) or {} for key in keys if key["part"] == part]))
        for part in parts
    ]
    (heading, header, rows), *others = tables
    return report(
        results,
        f"What the optimisations buy, preset {options.preset}, vocabulary {options.vocab_size}",
        command_line(NAME, argv),
        header,
        rows,
        f"{notes_of(parts, options)}\n\n{heading}",
        more=[text for title, columns, lines in others for text in (title, table(columns, lines))],
    )


if __name__ == "__main__":
    main()
