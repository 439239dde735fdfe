"""Held-out loss of small models after a short training on the embedded text: which choice learns faster.

    python benchmarks/learning.py --variants twin paper anchor --seeds 0 1 2 --max-steps 300 --threads 1

Every run is `ebt train clm` with the same data, tokens, batches and schedule; what differs is written out in
`VARIANTS`. What was tried to choose the learning rates: docs/results/anchor.md. Rows are written to
a file as they are measured; the same command continues where it was interrupted.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from common import Results, add_common_options, command_line, machine_settings, report

from ebt_transformers.training.run_clm import main as run_clm


NAME = "learning"
HEADER = ("variant", "differs by", "seeds", "validation loss", "each seed")
VARIANTS: dict[str, list[str]] = {
    "twin": ["--twin", "--learning_rate", "2.4e-3"],
    "twin-1.2e-3": ["--twin", "--learning_rate", "1.2e-3"],
    "twin-5e-3": ["--twin", "--learning_rate", "5e-3"],
    "twin-1e-2": ["--twin", "--learning_rate", "1e-2"],
    "twin-llama": ["--twin", "--twin_init", "llama", "--learning_rate", "2.4e-3"],
    "proposal": ["--recipe", "proposal", "--learning_rate", "5e-3"],
    "paper": ["--step_size", "5", "--learning_rate", "2.4e-3"],
    "paper-500": ["--step_size", "500", "--learning_rate", "2.4e-3"],
    "anchor": ["--step_size", "5", "--learning_rate", "5e-3", "--candidate_anchor", "token"],
    "anchor-shared": [
        *("--step_size", "0.2", "--learning_rate", "5e-3", "--candidate_anchor", "token"),
        *("--candidate_embedding", "shared"),
    ],
}


def train(variant: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Trains one variant and returns its validation loss and the seconds of training."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        run_clm(
            [
                *("--output_dir", folder, "--preset", options.preset, "--block_size", str(options.block_size)),
                *("--per_device_train_batch_size", str(options.batch_size), "--max_steps", str(options.max_steps)),
                *("--seed", str(seed), "--save_strategy", "no", "--logging_steps", "50", "--do_train", "--do_eval"),
                *("--report_to", "none"),
                *VARIANTS[variant],
            ]
        )
        seconds = time.perf_counter() - started
        metrics = json.loads((Path(folder) / "all_results.json").read_text(encoding="utf-8"))
    return {"loss": metrics["eval_loss"], "seconds": metrics.get("train_runtime", seconds)}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser, NAME)
    parser.set_defaults(preset="4xs", vocab_size=1024, threads=1)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=["twin", "paper", "anchor"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--max-steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--block-size", type=int, default=64)
    options = parser.parse_args(argv)
    if options.device != "cpu" or options.vocab_size != 1024:
        parser.error("this benchmark trains on the CPU, with the embedded tokenizer of 1024 tokens")
    settings = machine_settings(options)
    settings.update({name: getattr(options, name) for name in ("max_steps", "batch_size", "block_size")})
    results = Results(options.results, settings, options.fresh)
    # seed by seed, so that an interrupted run has compared everything at least once
    for seed in options.seeds:
        for variant in options.variants:
            if results.find(variant=variant, seed=seed) is None:
                results.append({"variant": variant, "seed": seed, **train(variant, seed, options)})

    rows = []
    for variant in options.variants:
        losses = [results.find(variant=variant, seed=seed)["loss"] for seed in options.seeds]
        each = ", ".join(f"{loss:.3f}" for loss in losses)
        flags = "`" + " ".join(VARIANTS[variant]) + "`"
        rows.append([variant, flags, str(len(losses)), f"{statistics.mean(losses):.3f}", each])
    tokens = options.max_steps * options.batch_size * options.block_size
    report(
        results,
        "Learning on the embedded text",
        command_line(NAME, sys.argv[1:] if argv is None else argv),
        HEADER,
        rows,
        f"Nats per token on the validation split after {options.max_steps} updates of {options.batch_size} x "
        f"{options.block_size} tokens ({tokens:,} in all), mean over seeds. Lower is better. "
        "What an update costs: benchmarks/training_step.py.",
        seed="each row's own",
    )


if __name__ == "__main__":
    main()
