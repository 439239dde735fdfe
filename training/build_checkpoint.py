"""Trains the embedded checkpoint and its twin, and puts the result into the package.

    python -m ebt_transformers.training.build_checkpoint --runs runs

Two calls of `ebt train clm` on Tiny Shakespeare (recipe s1, everything about them in `COMMON`, `EBT` and `TWIN`), each
keeping its best validation loss; then the losses of both on the held-out splits, of the EBT for several numbers of
thinking steps. Writes the model, its card (`README.md`) and `results.json` beside the tokenizer. Started again it goes
on where it was interrupted. About three quarters of an hour on two CPU cores.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..assets import checkpoint_path


if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK_SIZE = 256
STEPS = (1, 2, 4, 8)
COMMON = (
    *("--preset", "4xs"),
    *("--config_overrides", "hidden_size=192,intermediate_size=192,num_hidden_layers=3,num_attention_heads=6"),
    *("--block_size", str(BLOCK_SIZE), "--per_device_train_batch_size", "8", "--max_steps", "1600"),
    *("--eval_strategy", "steps", "--eval_steps", "200", "--save_steps", "200", "--save_total_limit", "2"),
    *("--load_best_model_at_end", "true", "--metric_for_best_model", "eval_loss"),
    *("--logging_steps", "50", "--seed", "33"),
)
EBT = ("--candidate_anchor", "token", "--step_size", "5", "--learning_rate", "4e-3")
TWIN = ("--twin", "--learning_rate", "2.4e-3")
NOTES = """## With and without thinking

Measured on the held-out splits, mean cross-entropy in nats per token. The twin is a Llama-style model of the same
shape, trained by the same script on the same tokens, with the learning rate that did best of four in short runs. Both
are taken where their validation loss was lowest; after that the EBT overfits faster than its twin.

{table}

{verdict}

The candidates of this model ride on the embedding of their context token (`candidate_anchor="token"`), which is not
in the paper; without it a model of this size learns far more slowly. It is a demonstration: 1.2 M parameters, plays of
one author, one seed. It knows nothing, and its text means nothing.
"""


def train(folder: Path, options: Sequence[str]) -> None:
    """One run of `ebt train clm`, or the rest of it."""
    from .run_clm import main

    main(["--output_dir", str(folder), *COMMON, *options])


def held_out_losses(folder: Path, steps: Sequence[int]) -> dict[str, dict[str, float]]:
    """Mean loss on the validation and test splits for every number of thinking steps; a twin has only one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..pipelines import mean_losses_by_steps
    from .data import held_out_blocks

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
    losses = {}
    for split in ("validation", "test"):
        blocks = held_out_blocks(tokenizer, BLOCK_SIZE, split)
        losses[split] = {str(count): loss for count, loss in mean_losses_by_steps(model, blocks, steps).items()}
    return losses


def summary(ebt: dict[str, dict[str, float]], twin: dict[str, dict[str, float]]) -> str:
    """The notes of the model card, computed from the losses."""
    lines = ["| model | thinking steps | validation loss | test loss |", "|---|---|---|---|"]
    for count, loss in ebt["validation"].items():
        lines.append(f"| EBT | {count} | {loss:.4f} | {ebt['test'][count]:.4f} |")
    (twin_validation,), (twin_test,) = twin["validation"].values(), twin["test"].values()
    lines.append(f"| Transformer++ twin | - | {twin_validation:.4f} | {twin_test:.4f} |")
    best = min(ebt["validation"], key=lambda count: ebt["validation"][count])
    spread = max(ebt["test"].values()) - min(ebt["test"].values())
    difference = ebt["test"][best] - twin_test
    verdict = (
        f"Best on validation: {best} step(s). On the test split the number of steps moves the loss by {spread:.4f} "
        f"nats, and the EBT is {abs(difference):.4f} nats {'worse' if difference > 0 else 'better'} than its twin, "
        "which costs a fraction of its time to train and to run."
    )
    return NOTES.format(table="\n".join(lines), verdict=verdict)


@contextmanager
def without_code(model: "PreTrainedModel") -> Iterator[None]:
    """The package brings the code: none has to travel with these weights."""
    classes = (type(model), type(model.config))
    marks = [vars(owner).get("_auto_class") for owner in classes]
    model.config.__dict__.pop("auto_map", None)
    for owner in classes:
        owner._auto_class = None
    try:
        yield
    finally:
        for owner, mark in zip(classes, marks, strict=True):
            owner._auto_class = mark


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing and installs the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the two training runs live")
    options = parser.parse_args(argv)
    from transformers import AutoModelForCausalLM

    ebt_run, twin_run = options.runs / "tiny_ebt", options.runs / "tiny_twin"
    train(ebt_run, EBT)
    train(twin_run, TWIN)
    ebt, twin = held_out_losses(ebt_run, STEPS), held_out_losses(twin_run, (1,))
    model = AutoModelForCausalLM.from_pretrained(ebt_run)
    # the longest text that fits behind a short prompt, sampled: greedy text of so small a model runs in circles
    model.generation_config.update(max_new_tokens=100, do_sample=True, temperature=0.8, top_k=50)
    with without_code(model):
        model.save_pretrained(checkpoint_path())
    card = (ebt_run / "README.md").read_text(encoding="utf-8").replace(str(ebt_run), "tiny_ebt")
    before, after = card.split("## Training", 1)
    (checkpoint_path() / "README.md").write_text(f"{before}{summary(ebt, twin)}\n## Training{after}", encoding="utf-8")
    results: dict[str, Any] = {
        "recipe": "s1",
        "seed": 33,
        "command": "python -m ebt_transformers.training.build_checkpoint",
        "ebt": {
            "validation_loss_by_steps": ebt["validation"],
            "test_loss_by_steps": ebt["test"],
            "validation_loss": ebt["validation"]["2"],
            "test_loss": ebt["test"]["2"],
        },
        "twin": {
            "validation_loss": next(iter(twin["validation"].values())),
            "test_loss": next(iter(twin["test"].values())),
        },
    }
    text = json.dumps(results, indent=2) + "\n"
    (checkpoint_path() / "results.json").write_text(text, encoding="utf-8")
    print(summary(ebt, twin))


if __name__ == "__main__":
    main()
