r"""Image completion by a small Energy Transformer, its masked autoencoder of equal size, and without a model.

    python benchmarks/completion.py --data data/cifar10/train_jpeg.parquet \
        --test-data data/cifar10/test_lossless.parquet --config hidden_size=128 image_size=32 patch_size=4

First short runs pick the settings of both models on images held out of the training file, with as many tries for
each; others change one option of the Energy Transformer. Then both are trained on the same images with the same masks,
for as many updates, and the cheaper one also for as long. Rows are written to a file as they are measured; the same
command continues where it was interrupted (a run that was, from its beginning).
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from common import Results, add_common_options, alternate, command_line, machine_settings, report
from completers.data import MASK_SEED, Data, load_data
from completers.figures import draw_rows, draw_steps, draw_thinking
from completers.fillings import Completer, judge, merge
from completers.measures import fill, think, time_models, validation_error, walk
from completers.tables import HEADER, all_rows, more_tables, notes_on, runs_of, thinking_of
from completers.training import Plan, Recipe, clock, complete, config_with, make_trainer, scaled, seconds_per_update
from torch import Tensor, nn
from tqdm import tqdm

from ebt_transformers import EnergyTransformerConfig, EnergyTransformerForImageCompletion


NAME = "completion"
ET, MAE, MAE_TIME = "et", "mae", "mae-time"
PICTURED = {"mae": "MAE", "mae-time": "MAE, equal time", "et": "ET"}
SHOWN_STEPS = (0, 1, 2, 4, 8, 12, 16, 24, 48)


# ---- picking settings ------------------------------------------------------------------------------------------


def grid_of(options: argparse.Namespace) -> list[Recipe]:
    """The tries of both models, as many for each."""
    rates = options.learning_rates
    ours = [Recipe(ET, rate, {"step_size": size}) for size in options.step_sizes for rate in rates[ET]]
    depths = [dict(zip(("encoder_layers", "decoder_layers"), depth, strict=True)) for depth in options.depths]
    twins = [Recipe(MAE, rate, depth) for depth in depths for rate in rates[MAE]]
    if len(ours) != len(twins):
        raise ValueError(
            f"The Energy Transformer would get {len(ours)} tries and its twin {len(twins)}: give as many "
            "--step-sizes times --learning-rates as --depths times --mae-learning-rates."
        )
    return [*ours, *twins]


def variants_of(best: Recipe, config: EnergyTransformerConfig) -> dict[str, Recipe]:
    """One option of the Energy Transformer changed, by name; what it is already is left out."""
    chosen = config_with(config, **best.fields)
    steps, size = chosen.thinking_steps, chosen.step_size
    heads = chosen.num_attention_heads
    narrower = heads * max(1, round(chosen.hidden_size / math.sqrt(2) / heads))
    changes: dict[str, dict[str, Any]] = {
        "completion_loss='rmse'": {"completion_loss": "rmse"},
        "completion_loss='mse'": {"completion_loss": "mse"},
        "visible_ratio=0": {"visible_ratio": 0.0},
        "visible_ratio=0.1": {"visible_ratio": 0.1},
        "self_attention=False": {"self_attention": False},
        "self_attention=True": {"self_attention": True},
        "attention_initializer_range=0.002": {"attention_initializer_range": 0.002},
        f"num_blocks=2, hidden_size={narrower}": {"num_blocks": 2, "hidden_size": narrower},
        f"thinking_steps={2 * steps}, step_size={size / 2:g}": {"thinking_steps": 2 * steps, "step_size": size / 2},
        f"thinking_steps={2 * steps}": {"thinking_steps": 2 * steps},
        "thinking_steps=12, step_size=0.1": {"thinking_steps": 12, "step_size": 0.1},
    }
    variants = {
        name: replace(best, fields={**best.fields, **change})
        for name, change in changes.items()
        if any(getattr(chosen, field) != value for field, value in change.items())
    }
    return {**variants, "random positions": replace(best, positions="random")}


def try_out(
    recipe: Recipe,
    seed: int,
    setup: tuple[EnergyTransformerConfig, Data, Results],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """A short run of a recipe, judged on the validation images."""
    config, data, results = setup
    key = {"kind": "trial", "recipe": asdict(recipe), "updates": options.trial_updates, "seed": seed}
    row = results.find(**key)
    if row is None:
        model = recipe.make(config, seed)
        seconds = train(recipe, model, data.train, options.trial_updates, seed, options)
        row = {**key, "mse": validation_error(model, data), "seconds": seconds}
        results.append(row)
    return row


def best_of(model: str, recipes: Sequence[Recipe], errors: Sequence[float | None]) -> Recipe:
    """The recipe of a model with the smallest error."""
    found = [
        (error, number)
        for number, (recipe, error) in enumerate(zip(recipes, errors, strict=True))
        if recipe.model == model and error is not None
    ]
    if not found:
        raise ValueError(f"Every try of {model!r} ran away. Give smaller --learning-rates.")
    return recipes[min(found)[1]]


# ---- training and judging --------------------------------------------------------------------------------------


def plans_of(
    chosen: dict[str, Recipe], ratio: float, config: EnergyTransformerConfig, options: argparse.Namespace
) -> list[Plan]:
    """Both models, the twin for as long as the Energy Transformer, and the latter with other numbers of steps."""
    longer, best = max(1, round(options.updates * ratio)), chosen[ET]
    plans = [
        Plan(ET, best, options.updates, options.seeds),
        Plan(MAE, chosen[MAE], options.updates, options.seeds),
        Plan(MAE_TIME, chosen[MAE], longer, options.seeds),
    ]
    for steps in options.also_steps:
        # as far in all as the steps of the others
        size = best.fields["step_size"] * config.thinking_steps / steps
        recipe = replace(best, fields={**best.fields, "thinking_steps": steps, "step_size": size})
        plans.append(Plan(f"{ET}-{steps}", recipe, options.updates, options.seeds[:1]))
    return plans


def train(
    recipe: Recipe, model: nn.Module, pixels: Tensor, updates: int, seed: int, options: argparse.Namespace
) -> float:
    """Trains a model in place; returns the seconds of [`clock`]."""
    folder = options.runs / "trainer"
    trainer = make_trainer(recipe, model, pixels, updates, options.batch_size, seed, folder, options.device)
    started = clock(options.device)
    trainer.train()
    seconds = clock(options.device) - started
    model.eval()
    return seconds


def run(plan: Plan, seed: int, setup: tuple[EnergyTransformerConfig, Data, Results], options: Any) -> nn.Module:
    """Trains and judges what is missing of one run; returns its model."""
    config, data, results = setup
    name, recipe, updates = plan.name, plan.recipe, plan.updates
    key = {"kind": "run", "name": name, "seed": seed, "recipe": asdict(recipe), "updates": updates}
    folder = options.runs / f"{name}-{updates}-{seed}"
    said = folder / "recipe.json"
    wanted = json.loads(json.dumps({**key, "settings": results.settings}))
    model = recipe.make(config, seed)
    before = json.loads(said.read_text(encoding="utf-8")) if said.is_file() else None
    if results.find(**key) is not None and before == wanted:
        return type(model).from_pretrained(folder).eval().to(options.device)  # type: ignore[attr-defined,no-any-return]
    seconds = train(recipe, model, data.train, updates, seed, options)
    images = scaled(data.test)
    quality = judge(complete(model, images, data.test_mask), images, data.hidden(data.test_mask))
    parameters = sum(each.numel() for each in model.parameters() if each.requires_grad)
    model.save_pretrained(folder)  # type: ignore[operator]
    said.write_text(json.dumps(wanted) + "\n", encoding="utf-8")
    results.append({**key, "parameters": parameters, "seconds": seconds, **asdict(quality)})
    return model


def follow(
    plan: Plan, seed: int, setup: tuple[EnergyTransformerConfig, Data, Results], options: argparse.Namespace
) -> nn.Module:
    """Trains and judges, and looks at the thinking of what thinks."""
    model = run(plan, seed, setup, options)
    if isinstance(model, EnergyTransformerForImageCompletion):
        think(model, plan.name, seed, *setup[1:], options)
    return model


def compare_updates(
    chosen: dict[str, Recipe], setup: tuple[EnergyTransformerConfig, Data, Results], options: argparse.Namespace
) -> float:
    """How many updates of the twin take as long as one of the Energy Transformer."""
    config, data, results = setup
    key = {"kind": "update", "recipes": {name: asdict(recipe) for name, recipe in chosen.items()}}
    if results.find(**key) is None:
        ours, theirs = (
            seconds_per_update(chosen[name], config, data.train, options.batch_size, options.runs, options.device)
            for name in (ET, MAE)
        )
        of_et, of_mae, ratio = alternate(ours, theirs, options.rounds)
        results.append({**key, ET: of_et, MAE: of_mae, "ratio": ratio})
    row = results.find(**key)
    assert row is not None  # just written
    return float(row["ratio"])


# ---- command line ----------------------------------------------------------------------------------------------


def fields_of(values: Sequence[str]) -> dict[str, Any]:
    """
    Fields of a config given as `name=value`, values in JSON.

    Args:
        values (sequence of `str`): of the command line.

    Raises:
        ValueError: for text without `=`, and names that the config does not have.
    """
    found = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals or name not in EnergyTransformerConfig().to_dict():
            raise ValueError(f"--config takes NAME=VALUE with fields of EnergyTransformerConfig, got {value!r}.")
        try:
            found[name] = json.loads(text)
        except json.JSONDecodeError:
            found[name] = text
    return found


def depth_of(text: str) -> tuple[int, int]:
    """`3,1` as layers of encoder and decoder."""
    encoder, decoder = map(int, text.split(","))
    return encoder, decoder


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser, NAME, text_models=False)
    parser.add_argument("--data", required=True, help="images to learn from: a parquet file, or a folder")
    parser.add_argument("--test-data", required=True, help="other images, to judge on")
    parser.add_argument("--config", nargs="+", default=[], metavar="NAME=VALUE", help="of the Energy Transformer")
    parser.add_argument("--updates", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights, images and masks")
    parser.add_argument("--train-images", type=int, help="learn from so many (default: all)")
    parser.add_argument("--validation-images", type=int, default=512, help="of the training file, to pick settings on")
    parser.add_argument("--test-images", type=int, default=1000)
    parser.add_argument("--trial-updates", type=int, default=300)
    parser.add_argument("--trial-seeds", type=int, nargs="+", default=[100], help="the first picks the settings")
    parser.add_argument("--step-sizes", type=float, nargs="+", default=[0.1, 0.3, 1.0])
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--mae-learning-rates", type=float, nargs="+", help="default: --learning-rates")
    parser.add_argument("--depths", type=depth_of, nargs="+", default=[(3, 1), (2, 2), (4, 2)], metavar="ENC,DEC")
    parser.add_argument("--no-variants", action="store_true", help="skip the comparison of options")
    parser.add_argument(
        "--also-steps", type=int, nargs="*", default=[], help="train with these numbers of steps, too (first seed)"
    )
    parser.add_argument("--most-steps", type=int, default=48, help="of thinking, to see what more of it does")
    parser.add_argument("--thinking-images", type=int, default=200, help="so many of the test images, to see that")
    parser.add_argument("--tolerances", type=float, nargs="*", default=[1e4, 3e3, 1e3], help="of thinking")
    parser.add_argument("--rounds", type=int, default=5, help="of timing")
    parser.add_argument("--grid-images", type=int, default=8, help="images shown")
    parser.add_argument("--runs", type=Path, default=Path("runs/completion"), help="where trained models are kept")
    options = parser.parse_args(argv)
    rates = options.learning_rates
    options.learning_rates = {ET: rates, MAE: options.mae_learning_rates or rates}
    return options


def draw(
    models: dict[str, nn.Module], methods: dict[str, Completer], data: Data, results: Results, options: Any
) -> list[str]:
    """The pictures, as markdown."""
    count = options.grid_images
    images, mask = scaled(data.test[:count]), data.test_mask[:count]
    hidden = data.hidden(mask)
    masked = images.masked_fill(hidden, 0.0)
    rows = {"original": images, "masked": masked}
    for name in ("visible mean", "linear"):
        rows[name] = merge(images, methods[name](images, mask), hidden)
    for name, title in PICTURED.items():
        rows[title] = merge(images, complete(models[name], images, mask), hidden)
    path = options.results
    trained = models[ET].config.thinking_steps
    pictures = {"completed": path.with_suffix(".png"), "steps": path.with_name(f"{path.stem}_steps.png")}
    pictures["thinking"] = path.with_name(f"{path.stem}_thinking.png")
    draw_rows(pictures["completed"], rows)
    twins = [row["mse"] for row in runs_of(results, MAE, options.updates, options.seeds)]
    stopped = [thinking_of(results, options, "tolerance", ET, tolerance=each) for each in options.tolerances]
    names = {trained: ET, **{steps: f"{ET}-{steps}" for steps in options.also_steps}}
    curves = {steps: thinking_of(results, options, "steps", name) for steps, name in names.items()}
    draw_steps(pictures["steps"], curves, sum(stopped, []), sum(twins) / len(twins))
    some = slice(0, min(4, count))
    walks, energies = walk(models[ET], images[some], mask[some], options.most_steps)
    walks = merge(images[some, None], walks, hidden[some, None])
    shown = [step for step in SHOWN_STEPS if step <= options.most_steps]
    draw_thinking(pictures["thinking"], images[some], masked[some], walks, energies, shown, trained)
    return [f"![{name}]({picture.name})" for name, picture in pictures.items()]


def main(argv: Sequence[str] | None = None) -> str:
    """Measures what is missing, draws the pictures and prints the tables."""
    options = parse(argv)
    config = EnergyTransformerConfig.for_images(**fields_of(options.config))
    if config.num_blocks != 1:
        raise ValueError(
            f"What longer thinking does is measured for one block. --config num_blocks must be 1, got "
            f"{config.num_blocks}."
        )
    settings = machine_settings(options)
    data, about = load_data(options, config)
    settings |= {**about, "config": config.to_diff_dict(), "batch_size": options.batch_size}
    settings["config"].pop("transformers_version", None)
    results = Results(options.results, settings, options.fresh)
    setup = (config, data, results)

    methods = fill(data, results)
    recipes = grid_of(options)
    tries = [try_out(recipe, options.trial_seeds[0], setup, options) for recipe in tqdm(recipes, desc="tries")]
    errors = [row["mse"] for row in tries]
    chosen = {name: best_of(name, recipes, errors) for name in (ET, MAE)}
    ratio = compare_updates(chosen, setup, options)
    plans = plans_of(chosen, ratio, config, options)
    models: dict[str, nn.Module] = {}
    for seed in tqdm(options.seeds, desc="seeds"):
        for plan in (plan for plan in plans[:3] if seed in plan.seeds):
            models.setdefault(plan.name, follow(plan, seed, setup, options))
    time_models(models[ET], models[MAE], data, results, options)
    variants = {} if options.no_variants else {"as chosen": chosen[ET], **variants_of(chosen[ET], config)}
    changed = {
        name: [try_out(recipe, seed, setup, options) for seed in options.trial_seeds]
        for name, recipe in tqdm(variants.items(), desc="options")
    }
    for plan in plans[3:]:
        follow(plan, options.seeds[0], setup, options)
    pictures = draw(models, methods, data, results, options)
    return report(
        results,
        "Image completion",
        command_line(NAME, sys.argv[1:] if argv is None else argv),
        HEADER,
        all_rows(results, plans, list(methods)),
        notes_on(config, chosen, options, settings),
        seed=f"{', '.join(map(str, options.seeds))} (weights, images and masks of training); {MASK_SEED} (test masks)",
        more=[*pictures, *more_tables(results, plans, tries, changed, options)],
    )


if __name__ == "__main__":
    main()
