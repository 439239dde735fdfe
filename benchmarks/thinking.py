"""Does thinking pay? Perplexity by number of thinking steps, of small models trained here or of given checkpoints.

    python benchmarks/thinking.py --data data --variants twin s1 s2 --seeds 0 1 2 --max-steps 1200 --threads 1
    python benchmarks/thinking.py --data data --checkpoints ebt=runs/a,runs/b twin=runs/c,runs/d

Every run is `ebt train clm` on the same text, with the same batches and schedule; what differs is written out in
`VARIANTS`. Beside equal data there are twins trained as long as an EBT is by operations or by time. What is tested on
was not trained on, and the number of steps called best is picked on other text. Rows are written to a file as they are
measured; the same command continues where it was interrupted.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Results, add_common_options, command_line, machine_settings, report
from thinkers.data import DEFAULT_TRAINING, TRAINING, Texts, load_tests, prepare_texts
from thinkers.measures import Evaluation, compare_updates, fewest_steps, file_fingerprint, thinks
from thinkers.plots import draw_difficulty, draw_steps
from thinkers.tables import Found, all_tables, notes_on, steps_lines
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ebt_transformers.training.run_clm import main as run_clm
from ebt_transformers.training.trainer import find_last_checkpoint


NAME = "thinking"
TWIN = ["--twin", "--learning_rate", "5e-3"]
VARIANTS: dict[str, list[str]] = {
    "twin": TWIN,
    "s1": ["--step_size", "5", "--learning_rate", "2.4e-3"],
    "s2": ["--recipe", "s2", "--learning_rate", "2.4e-3"],
    "s2-8": ["--recipe", "s2", "--random_steps", "2", "8", "--learning_rate", "2.4e-3"],
    "s2-anchor": ["--recipe", "s2", "--candidate_anchor", "token", "--learning_rate", "5e-3"],
    "anchor": ["--candidate_anchor", "token", "--step_size", "5", "--learning_rate", "5e-3"],
    "proposal": ["--recipe", "proposal", "--learning_rate", "5e-3"],
    "twin-flops": TWIN,
    "twin-time": TWIN,
}
# twins with more updates: which ratio of an update of the EBT to one of theirs says how many
EQUAL_COMPUTE = {"twin-flops": "flops_ratio", "twin-time": "seconds_ratio"}
WEIGHTS = "model.safetensors"
SAVES = 4  # checkpoints of a run, so that an interrupted one loses little
SETTINGS = ("max_steps", "batch_size", "config_overrides")


@dataclass(frozen=True)
class Run:
    """
    A model to train.

    Args:
        name (`str`): of the variant; of a twin with more updates also of whom it equals.
        variant (`str`): one of `VARIANTS`.
        of (`str`, *optional*): the variant whose compute it gets.
    """

    name: str
    variant: str
    of: str | None = None


def is_twin(variant: str) -> bool:
    """Whether a variant does not think."""
    return "--twin" in VARIANTS[variant]


def wanted_runs(variants: Sequence[str], compute_of: Sequence[str]) -> list[Run]:
    """
    What to train: twins first, as they say which tokens are difficult, and those with more updates last, as what they
    equal has to be measured.

    Args:
        variants, compute_of (sequences of `str`): as on the command line.

    Raises:
        ValueError: if nobody trains the variant whose compute is wanted, or it is a twin.
    """
    listed = sorted((name for name in variants if name not in EQUAL_COMPUTE), key=lambda name: not is_twin(name))
    plain = [Run(name, name) for name in listed]
    more = [name for name in variants if name in EQUAL_COMPUTE]
    trained = [run.name for run in plain if not is_twin(run.variant)]
    for of in compute_of if more else ():
        if of not in trained:
            raise ValueError(
                f"{', '.join(more)} shall equal {of!r}, which is no EBT among --variants. Allowed: "
                f"{', '.join(trained) or 'none'}. Change --compute-of."
            )
    return plain + [Run(f"{name} of {of}", name, of) for of in compute_of for name in more]


# ---- training --------------------------------------------------------------------------------------------------


def flags_of(variant: str, overrides: str | None) -> list[str]:
    """The options of a variant, with config fields that all of them get."""
    flags = list(VARIANTS[variant])
    if overrides is None:
        return flags
    if "--config_overrides" in flags:
        flags[flags.index("--config_overrides") + 1] += f",{overrides}"
        return flags
    return [*flags, "--config_overrides", overrides]


def weights_of(folder: Path, updates: int) -> Path | None:
    """Where the weights of a finished and evaluated run are; None if there is more to do."""
    results = folder / "all_results.json"
    if not results.is_file() or "eval_loss" not in json.loads(results.read_text(encoding="utf-8")):
        return None
    if (folder / WEIGHTS).is_file():
        return folder
    # interrupted after its last update: it was evaluated later, and lives in its last checkpoint
    last = folder / f"checkpoint-{updates}"
    return last if (last / WEIGHTS).is_file() else None


def train(run: Run, seed: int, updates: int, options: argparse.Namespace, texts: Texts) -> tuple[Path, float]:
    """
    Trains what is missing of one run.

    Args:
        run ([`Run`]): which model.
        seed (`int`): of its weights and the order of the data.
        updates (`int`): of its weights.
        options (`argparse.Namespace`): of the command line.
        texts ([`Texts`]): to train on.

    Returns:
        The folder with the weights, and the loss on the validation text.

    Raises:
        ValueError: if the folder belongs to a run with other options.
    """
    size = f"{options.preset}-{options.batch_size}x{options.block_size}-{texts.fingerprint}"
    folder = options.runs / size / f"{run.name.replace(' ', '-')}-{updates}-{seed}"
    argv = ["--preset", options.preset, "--block_size", str(options.block_size), "--max_steps", str(updates)]
    argv += ["--per_device_train_batch_size", str(options.batch_size), "--seed", str(seed)]
    argv += flags_of(run.variant, options.config_overrides)
    said = folder.with_name(f"{folder.name}.json")
    if said.is_file() and (before := json.loads(said.read_text(encoding="utf-8"))) != argv:
        raise ValueError(
            f"{folder} was trained with other options ({' '.join(before)}; now {' '.join(argv)}). Remove it and "
            f"{said.name}, or give another folder as --runs."
        )
    said.parent.mkdir(parents=True, exist_ok=True)
    said.write_text(json.dumps(argv) + "\n", encoding="utf-8")
    if weights_of(folder, updates) is None:
        files = ["--train_file", str(texts.train), "--validation_file", str(texts.validation)]
        argv += [*files, "--tokenizer_name", str(texts.tokenizer), "--output_dir", str(folder)]
        argv += ["--save_strategy", "steps", "--save_steps", str(-(-updates // SAVES)), "--save_total_limit", "1"]
        argv += ["--logging_steps", "50", "--do_train", "--do_eval", "--report_to", "none"]
        # what an interrupted run left behind before its first checkpoint is of no use
        run_clm([*argv, *(["--overwrite"] if find_last_checkpoint(folder) is None else [])])
    weights = weights_of(folder, updates)
    assert weights is not None  # run_clm evaluates and saves, or raises
    return weights, json.loads((folder / "all_results.json").read_text(encoding="utf-8"))["eval_loss"]


def update_key(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What the cost of an update of a variant is found by: it depends on the options of the variant."""
    return {"kind": "update", "name": name, "flags": " ".join(flags_of(name, options.config_overrides))}


def updates_of(run: Run, options: argparse.Namespace, results: Results) -> int:
    """How many updates a run gets: as many as all, or those that make its compute equal to another's."""
    if run.of is None:
        return options.max_steps
    row = results.find(**update_key(run.of, options))
    assert row is not None  # measured when that variant was trained
    return max(1, round(options.max_steps * row[EQUAL_COMPUTE[run.variant]]))


# ---- the models to look at -------------------------------------------------------------------------------------


def named_checkpoints(values: Sequence[str]) -> dict[str, list[Path]]:
    """
    `DIR`, `NAME=DIR` and `NAME=DIR,DIR` as folders by name; several of one name are runs with seeds 0, 1, ...

    Args:
        values (sequence of `str`): of the command line.

    Raises:
        FileNotFoundError: for a folder that is not there.
        ValueError: for a name given twice.
    """
    found: dict[str, list[Path]] = {}
    for value in values:
        name, equals, listed = value.partition("=")
        folders = [Path(part) for part in (listed if equals else value).split(",")]
        name = name if equals else folders[0].resolve().name
        for folder in folders:
            if not folder.is_dir():
                raise FileNotFoundError(f"There is no checkpoint folder {folder}. Give [NAME=]DIR[,DIR].")
        if name in found:
            raise ValueError(f"Two checkpoints are called {name!r}: name them, as in NAME=DIR.")
        found[name] = folders
    return found


def look_at(
    evaluation: Evaluation, name: str, seed: int, folder: Path, updates: int | None, validation: float | None
) -> Any:
    """Measures what is missing of one model, and notes what it is. Returns the model."""
    options, results = evaluation.options, evaluation.results
    model = AutoModelForCausalLM.from_pretrained(folder).eval().to(options.device)
    if model.config.vocab_size < evaluation.vocabulary:
        raise ValueError(
            f"{folder} has a vocabulary of {model.config.vocab_size}, and the tokenizer has {evaluation.vocabulary} "
            "tokens: models with different tokenizers cannot be compared."
        )
    key = {"kind": "model", "name": name, "seed": seed, "model": file_fingerprint(folder / WEIGHTS)}
    if results.find(**key) is None:
        config = model.config
        about = {
            "thinks": thinks(model),
            "fewest": fewest_steps(config),
            "noise": float(getattr(config, "thinking_noise_std", 0.0)),
            "parameters": model.num_parameters(),
        }
        results.append({**key, **about, "updates": updates, "validation_loss": validation})
    evaluation(model, key)
    return model


def run_checkpoints(evaluation: Evaluation, checkpoints: dict[str, list[Path]]) -> None:
    """Measures given models, those that do not think first: they say which tokens are difficult."""
    listed = [(name, seed, folder) for name, folders in checkpoints.items() for seed, folder in enumerate(folders)]
    for name, seed, folder in tqdm(sorted(listed, key=lambda item: _will_think(item[2])), desc="models"):
        look_at(evaluation, name, seed, folder, None, None)


def _will_think(folder: Path) -> bool:
    return hasattr(AutoConfig.from_pretrained(folder), "default_thinking")


def run_all(evaluation: Evaluation, runs: Sequence[Run], texts: Texts) -> None:
    """Trains and measures seed by seed, so that an interrupted run has compared everything at least once."""
    options, results = evaluation.options, evaluation.results
    plan = [(seed, run) for seed in options.seeds for run in runs]
    for seed, run in tqdm(plan, desc="runs"):
        updates = updates_of(run, options, results)
        folder, loss = train(run, seed, updates, options, texts)
        model = look_at(evaluation, run.name, seed, folder, updates, loss)
        if run.of is None and results.find(**update_key(run.name, options)) is None:
            arguments = torch.load(folder / "training_args.bin", weights_only=False)  # our own file
            ratios = compare_updates(model, arguments, options.batch_size, options.block_size, options.repeats)
            results.append({**update_key(run.name, options), **ratios})


# ---- command line ----------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser, NAME, text_models=False)
    parser.set_defaults(results=None, threads=1)
    parser.add_argument("--data", type=Path, required=True, help="folder with text/ and qa/")
    parser.add_argument("--preset", default="4xs", help="size of the models, as in EBTConfig.from_preset")
    parser.add_argument("--vocab-size", type=int, default=1024, help="tokens of the tokenizer, trained here")
    parser.add_argument("--config-overrides", help="config fields of all models, such as num_hidden_layers=1")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=["twin", "s1", "s2"])
    parser.add_argument("--compute-of", nargs="+", default=["s1"], help="whom twin-flops and twin-time equal")
    parser.add_argument("--train-sets", nargs="+", choices=list(TRAINING), default=list(DEFAULT_TRAINING))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--max-steps", type=int, default=1200, help="updates of every model")
    parser.add_argument("--batch-size", type=int, default=32, help="rows of an update, and of an evaluated batch")
    parser.add_argument("--block-size", type=int, default=64, help="tokens of a row")
    parser.add_argument("--runs", type=Path, default=Path("runs/thinking"), help="where models and texts are kept")
    parser.add_argument("--checkpoints", nargs="+", metavar="[NAME=]DIR[,DIR]", help="look at these; train nothing")
    parser.add_argument("--test-tokens", type=int, default=8192, help="of every test set")
    parser.add_argument("--steps", nargs="+", type=int, default=[0, 1, 2, 3, 4, 6, 8, 12, 16], help="of thinking")
    parser.add_argument("--candidates", type=int, default=4, help="of self-verification; 1 for none")
    parser.add_argument("--candidate-steps", nargs="+", type=int, help="of self-verification; default: all but 0")
    noises = "train: also that of training, of models that had some"
    parser.add_argument("--noise", choices=("0", "train"), default="train", help=noises)
    parser.add_argument("--repeats", type=int, default=3, help="turns of every timing")
    options = parser.parse_args(argv)
    if min(options.steps) < 0 or max(options.steps) < 1:
        parser.error(f"--steps must be at least 0, one of them above, got {options.steps}")
    options.steps = sorted(set(options.steps))
    if options.candidate_steps is None:
        options.candidate_steps = [count for count in options.steps if count]
    if min(options.candidate_steps) < 1 or not set(options.candidate_steps) <= set(options.steps):
        parser.error(f"--candidate-steps must be above 0 and among --steps, got {options.candidate_steps}")
    options.candidate_steps = sorted(set(options.candidate_steps))
    for name in ("candidates", "test_tokens", "max_steps", "batch_size", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    return options


def main(argv: Sequence[str] | None = None) -> str:
    """Trains and measures what is missing, draws the pictures and prints the tables."""
    options = parse(argv)
    settings = machine_settings(options)
    settings |= {name: getattr(options, name) for name in ("block_size", "test_tokens")}
    if options.checkpoints is None:
        runs, checkpoints = wanted_runs(options.variants, options.compute_of), {}
        texts = prepare_texts(options.data, options.runs, options.train_sets, options.vocab_size)
        tokenizer, validation = texts.tokenizer, texts.validation
        settings |= {"texts": texts.fingerprint, **{name: getattr(options, name) for name in SETTINGS}}
        names, stem = [run.name for run in runs], f"{NAME}_{options.preset}"
    else:
        runs, checkpoints = [], named_checkpoints(options.checkpoints)
        tokenizer, validation = next(iter(checkpoints.values()))[0], None
        settings |= {"tokenizer": file_fingerprint(tokenizer / "tokenizer.json")}
        settings = {name: value for name, value in settings.items() if name not in ("preset", "vocab_size")}
        for folder in (folder for folders in checkpoints.values() for folder in folders):
            if file_fingerprint(folder / "tokenizer.json") != settings["tokenizer"]:
                raise ValueError(f"{folder} has another tokenizer than {tokenizer}: they cannot be compared.")
        names, stem = list(checkpoints), f"{NAME}_checkpoints"
    if options.results is None:
        options.results = RESULTS / f"{stem}.jsonl"
    results = Results(options.results, settings, options.fresh)
    tokens = AutoTokenizer.from_pretrained(tokenizer)
    tests = load_tests(options.data, tokens, options.block_size, options.test_tokens, validation)
    evaluation = Evaluation(results, tests, options, len(tokens))
    if options.checkpoints is None:
        run_all(evaluation, runs, texts)
    else:
        run_checkpoints(evaluation, checkpoints)

    flags = {run.name: " ".join(flags_of(run.variant, options.config_overrides)) for run in runs}
    found = Found(results.rows, names, evaluation.fingerprints, options, flags)
    stem = options.results.stem
    pictures = [options.results.with_name(f"{stem}{end}.png") for end in ("", "_difficulty")]
    draw_steps(pictures[0], found)
    shown = [f"![Perplexity by thinking steps]({pictures[0].name})"]
    if draw_difficulty(pictures[1], found):
        shown.append(f"![Loss by difficulty and thinking steps]({pictures[1].name})")
    header, lines = steps_lines(found, inside=True)
    return report(
        results,
        "Thinking longer",
        command_line(NAME, sys.argv[1:] if argv is None else argv),
        header,
        lines,
        notes_on(found),
        seed=", ".join(map(str, found.seeds)) + " (of weights and data order)",
        more=[*all_tables(found), *shown],
    )


if __name__ == "__main__":
    main()
