"""One training step (forward and backward, no optimiser) of an EBT with recipe s1 against its Transformer++ twin.

    python benchmarks/training_step.py --preset xxs --vocab-size 50277 --batch-sizes 4 --contexts 256 --threads 2

Time: both models take turns in one process, and the ratio is the median over the turns. Memory: each model has a
process of its own, and what counts is the highest memory use while it trains (weights, gradients and activations),
less what the process used before the model was built. Random weights and tokens. Rows are written to a file as they
are measured; the same command continues where it was interrupted.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import Results, add_common_options, alternate, command_line, machine_settings, report, timed
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.utils.logging import tqdm

from ebt_transformers import EBTConfig, EBTForCausalLM, transformer_pp_config


NAME = "training_step"
HEADER = ("batch", "context", "EBT s", "twin s", "time x twin", "EBT MB", "twin MB", "memory x twin")
MEMORY_STEPS = 2  # the second has the gradients of the first to hold


def build(name: str, options: argparse.Namespace, context: int) -> PreTrainedModel:
    """One of the two models, in training mode."""
    torch.manual_seed(options.seed)
    size = {"vocab_size": options.vocab_size, "max_position_embeddings": context}
    config = EBTConfig.from_preset(options.preset, recipe="s1", thinking_steps=options.steps, **size)
    model = EBTForCausalLM(config) if name == "ebt" else LlamaForCausalLM(transformer_pp_config(config))
    return model.to(options.device).train()


def step_of(model: PreTrainedModel, options: argparse.Namespace, batch: int, context: int) -> Callable[[], None]:
    """A function that does one step."""
    generator = torch.Generator().manual_seed(options.seed)
    ids = torch.randint(0, options.vocab_size, (batch, context), generator=generator).to(options.device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    return step


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
    (batch,), (context,) = options.batch_sizes, options.contexts
    if torch.device(options.device).type == "cuda":
        step = step_of(build(options.memory_of, options, context), options, batch, context)
        for _ in range(MEMORY_STEPS):
            step()
        return torch.cuda.max_memory_allocated(options.device) / 2**20
    import psutil

    before = psutil.Process().memory_info().rss
    step = step_of(build(options.memory_of, options, context), options, batch, context)
    for _ in range(MEMORY_STEPS):
        step()
    return (peak_resident() - before) / 2**20


def memory_in_subprocess(name: str, options: argparse.Namespace, batch: int, context: int) -> float:
    """[`peak_memory`] of one model, measured in a new process."""
    command = [sys.executable, __file__, "--memory-of", name, "--batch-sizes", str(batch), "--contexts", str(context)]
    for option in ("preset", "vocab_size", "threads", "device", "seed", "steps"):
        command += [f"--{option.replace('_', '-')}", str(getattr(options, option))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"Measuring the memory of {name} failed:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def measure(options: argparse.Namespace, batch: int, context: int) -> dict[str, Any]:
    """One row."""
    steps = {name: step_of(build(name, options, context), options, batch, context) for name in ("ebt", "twin")}
    ebt, twin, ratio = alternate(
        lambda: [timed(steps["ebt"], options.device)],
        lambda: [timed(steps["twin"], options.device)],
        options.repeats,
    )
    steps.clear()
    row = {"batch": batch, "context": context, "ebt_seconds": ebt, "twin_seconds": twin, "ratio": ratio}
    for name in ("ebt", "twin"):
        row[f"{name}_megabytes"] = memory_in_subprocess(name, options, batch, context)
    return row


def main(argv: Sequence[str] | None = None) -> str:
    """Runs the benchmark and returns its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser, NAME)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4])
    parser.add_argument("--contexts", type=int, nargs="+", default=[256], help="tokens per row")
    parser.add_argument("--steps", type=int, default=2, help="thinking steps of the EBT")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--memory-of", choices=("ebt", "twin"), help=argparse.SUPPRESS)
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(argv)
    if options.memory_of is not None:
        torch.set_num_threads(options.threads)
        print(json.dumps(peak_memory(options)))
        return ""

    settings = {**machine_settings(options), "steps": options.steps, "repeats": options.repeats}
    results = Results(options.results, settings, options.fresh)
    keys = list(product(options.batch_sizes, options.contexts))
    missing = [key for key in keys if results.find(batch=key[0], context=key[1]) is None]
    for batch, context in tqdm(missing, desc=f"{len(keys) - len(missing)} rows found, measuring", unit="row"):
        results.append(measure(options, batch, context))

    rows = []
    for batch, context in keys:
        row = results.find(batch=batch, context=context)
        memory = [row["ebt_megabytes"], row["twin_megabytes"]]
        rows.append(
            [
                str(batch),
                str(context),
                f"{row['ebt_seconds']:.3f}",
                f"{row['twin_seconds']:.3f}",
                f"{row['ratio']:.2f}",
            ]
            + [*(f"{value:.0f}" for value in memory), f"{memory[0] / memory[1]:.2f}"]
        )
    title = f"Training step, preset {options.preset}, vocabulary {options.vocab_size}, recipe s1"
    notes = f"{options.steps} thinking steps, every step scored."
    return report(results, title, command_line(NAME, argv), HEADER, rows, notes)


if __name__ == "__main__":
    main()
