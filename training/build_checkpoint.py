"""Trains the embedded checkpoint and its twin, and puts the result into the package.

    python -m ebt_transformers.training.build_checkpoint --runs runs
    python -m ebt_transformers.training.build_checkpoint --card_only

Two calls of `ebt train clm` on Tiny Shakespeare (recipe s1, everything about them in `COMMON`, `EBT` and `TWIN`), each
keeping its best validation loss; then the losses of both on the held-out splits, of the EBT for several numbers of
thinking steps. Writes the model, `results.json` and, from it, the card (`README.md`, `energy.png`) beside the
tokenizer. Started again it goes on where it was interrupted. About three quarters of an hour on two CPU cores. The
second command measures thinking anew and writes the card, without training.
"""

import argparse
import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..assets import checkpoint_path
from ..reporting import of_steps, table


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .card_facts import CardFacts

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
TWIN = ("--twin", "--twin_init", "llama", "--learning_rate", "2.4e-3")
DATA = f"tiny_shakespeare, packed into blocks of {BLOCK_SIZE} tokens"
LIMITS = (
    "A demonstration: 1.2 M parameters, plays of one author, one seed. It knows nothing, and its text means nothing.",
    "It overfits: after step 1000 its validation loss no longer falls. These are the weights of that step.",
)
COMPARISON = "With and without thinking"  # a section of the card
NOTES = """Measured on the held-out splits, mean cross-entropy in nats per token. The twin is a Llama-style model of
the same shape, trained by the same script on the same tokens, with the learning rate that did best of four in short
runs. Both are taken where their validation loss was lowest; after that the EBT overfits faster than its twin.

{table}

{verdict}

The candidates of this model ride on the embedding of their context token (`candidate_anchor="token"`), which is not
in the paper; without it a model of this size learns far more slowly."""
LICENCE = "The weights are under Apache-2.0, as the package is. The plays of Shakespeare are in the public domain."


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
    """What the model card says about the twin, computed from the losses."""
    rows = [["EBT", count, f"{loss:.4f}", f"{ebt['test'][count]:.4f}"] for count, loss in ebt["validation"].items()]
    (twin_validation,), (twin_test,) = twin["validation"].values(), twin["test"].values()
    rows.append(["Transformer++ twin", "-", f"{twin_validation:.4f}", f"{twin_test:.4f}"])
    best = min(ebt["validation"], key=lambda count: ebt["validation"][count])
    spread = max(ebt["test"].values()) - min(ebt["test"].values())
    difference = ebt["test"][best] - twin_test
    verdict = (
        f"Best on validation: {of_steps(int(best))}. On the test split the number of steps moves the loss by "
        f"{spread:.4f} nats, and the EBT is {abs(difference):.4f} nats "
        f"{'worse' if difference > 0 else 'better'} than its twin, "
        "which costs a fraction of its time to train and to run."
    )
    return NOTES.format(
        table=table(["model", "thinking steps", "validation loss", "test loss"], rows), verdict=verdict
    )


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


def facts_of(run: Path) -> "CardFacts":
    """What the card says about a finished run, from the files it left behind."""
    import torch
    from transformers import AutoModelForCausalLM, TrainerState

    from .card_sections import RESULTS
    from .model_card import RunFacts, card_facts
    from .trainer import TRAINER_STATE, EBTTrainer

    command = shlex.join(["ebt", "train", "clm", "--output_dir", checkpoint_path().name, *COMMON, *EBT])
    about = RunFacts(data=DATA, command=command, license="apache-2.0", limits=list(LIMITS))
    arguments = torch.load(run / "training_args.bin", weights_only=False)  # our own file
    arguments.eval_strategy = "no"  # nothing is trained here, so a Trainer needs no data to evaluate on
    arguments.load_best_model_at_end = False
    trainer = EBTTrainer(AutoModelForCausalLM.from_pretrained(run), arguments, run_facts=about)
    trainer.state = TrainerState.load_from_json(str(run / TRAINER_STATE))
    facts = card_facts(trainer, checkpoint_path().name, {"language": "en"})
    found = json.loads((run / "all_results.json").read_text(encoding="utf-8"))
    facts.results |= {name: found[name] for name in RESULTS if name in found}
    return facts


def write_shipped_card(folder: Path) -> None:
    """Measures what thinking does in the embedded checkpoint, notes it in `results.json`, and writes the card."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .card_measurements import measure_thinking, some_rows
    from .data import CausalLMCollator, held_out_blocks
    from .model_card import CardFacts, write_card

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = some_rows(held_out_blocks(tokenizer, BLOCK_SIZE, "validation"))
    measured = measure_thinking(model, CausalLMCollator(tokenizer.pad_token_id)(rows))
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    _write_json(folder / "results.json", {**results, "thinking": asdict(measured)})
    ebt, twin = results["ebt"], results["twin"]
    compared = summary(
        {split: ebt[f"{split}_loss_by_steps"] for split in ("validation", "test")},
        {split: {"0": twin[f"{split}_loss"]} for split in ("validation", "test")},
    )
    more = {COMPARISON: compared, "Licence": LICENCE}
    write_card(folder, model, CardFacts.from_dict(results["card"]), measured, more, "validation split")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def build(runs: Path) -> None:
    """Runs what is missing and puts weights and results into the package."""
    from transformers import AutoModelForCausalLM

    ebt_run, twin_run = runs / "tiny_ebt", runs / "tiny_twin"
    train(ebt_run, EBT)
    train(twin_run, TWIN)
    ebt, twin = held_out_losses(ebt_run, STEPS), held_out_losses(twin_run, (1,))
    model = AutoModelForCausalLM.from_pretrained(ebt_run)
    # the longest text that fits behind a short prompt, sampled: greedy text of so small a model runs in circles
    model.generation_config.update(max_new_tokens=100, do_sample=True, temperature=0.8, top_k=50)
    with without_code(model):
        model.save_pretrained(checkpoint_path())
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
        "card": facts_of(ebt_run).to_dict(),
    }
    _write_json(checkpoint_path() / "results.json", results)
    print(summary(ebt, twin))


def main(argv: Sequence[str] | None = None) -> None:
    """Builds the checkpoint, unless it is there already, and writes its card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the two training runs live")
    parser.add_argument("--card_only", action="store_true", help="write the card of the weights that are there")
    options = parser.parse_args(argv)
    if not options.card_only:
        build(options.runs)
    write_shipped_card(checkpoint_path())


if __name__ == "__main__":
    main()
