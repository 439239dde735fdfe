"""The tables of benchmarks/completion.py. Not a script."""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import Results
from completers.training import OPTIMIZER, WARM_UP, Plan, Recipe

from ebt_transformers import EnergyTransformerConfig
from ebt_transformers.reporting import table


HEADER = (
    *("method", "parameters", "updates", "training s", "ms per image", "masked MSE", "spread", "of variance"),
    "PSNR (dB)",
)
TITLES = {"et": "Energy Transformer", "mae": "MAE, equal updates", "mae-time": "MAE, equal time"}
SHOWN = (0, 1, 2, 4, 8, 12, 16, 24, 48)
Row = Mapping[str, Any]


def runs_of(results: Results, name: str, updates: int, seeds: Sequence[int]) -> list[Row]:
    """The newest row of every seed."""
    found = [results.find(kind="run", name=name, seed=seed, updates=updates) for seed in seeds]
    return [row for row in found if row is not None]


def mean(rows: Sequence[Row], name: str) -> float:
    """Over rows."""
    return statistics.fmean(row[name] for row in rows)


def all_rows(results: Results, plans: Sequence[Plan], fillings: Sequence[str]) -> list[list[str]]:
    """
    The table of all methods, those without a model first.

    Args:
        results ([`Results`]): what was measured.
        plans (sequence of `Plan`): what was trained.
        fillings (sequence of `str`): names of the methods without a model.
    """
    lines = []
    for name in fillings:
        row = results.find(kind="filling", name=name)
        assert row is not None  # measured before the models
        lines.append([name, "", "", "", f"{row['ms']:.2f}", *_quality([row])])
    times = results.find(kind="time")
    assert times is not None
    for plan in plans:
        rows = runs_of(results, plan.name, plan.updates, plan.seeds)
        about = [f"{rows[0]['parameters']:,}", f"{plan.updates:,}", f"{mean(rows, 'seconds'):.0f}"]
        asked = times.get(plan.name.removesuffix("-time"))
        lines.append([_title(plan), *about, "" if asked is None else f"{asked:.2f}", *_quality(rows)])
    return lines


def _title(plan: Plan) -> str:
    """What a plan is called in tables."""
    if plan.name in TITLES:
        return TITLES[plan.name]
    return f"Energy Transformer, {plan.recipe.fields['thinking_steps']} steps"


def _quality(rows: Sequence[Row]) -> list[str]:
    errors = [row["mse"] for row in rows]
    spread = f"{max(errors) - min(errors):.4f}" if len(rows) > 1 else ""
    shown = [f"{mean(rows, 'mse'):.4f}", spread, f"{100 * mean(rows, 'share'):.1f} %"]
    return [*shown, f"{mean(rows, 'psnr'):.2f}"]


def _error(value: float | None) -> str:
    return "ran away" if value is None else f"{value:.4f}"


def _written(recipe: Recipe | Mapping[str, Any]) -> str:
    values = recipe["fields"] if isinstance(recipe, Mapping) else recipe.fields
    return ", ".join(f"{name}={value}" for name, value in values.items())


def more_tables(
    results: Results,
    plans: Sequence[Plan],
    tries: Sequence[Row],
    changed: Mapping[str, Sequence[Row]],
    options: argparse.Namespace,
) -> list[str]:
    """Longer and shorter thinking, the tries, and what options change."""
    thinking = [plan for plan in plans if plan.recipe.model == "et"]
    parts = ["## Thinking longer and shorter than in training", _about_steps(results, options)]
    parts.append(_steps_table(results, thinking, options))
    if options.tolerances:
        parts += ["## Stopping by `thinking_tolerance`", _tolerance_table(results, options)]
    lines = [
        [TITLES[row["recipe"]["model"]].split(",")[0], _written(row["recipe"]), f"{row['recipe']['learning_rate']:g}"]
        + [_error(row["mse"])]
        for row in tries
    ]
    parts += [
        "## The tries",
        f"{options.trial_updates} updates each, judged on {options.validation_images} images of the training file.",
        table(("model", "settings", "learning rate", "masked MSE"), lines),
    ]
    if changed:
        lines = [_changed_line(name, rows) for name, rows in changed.items()]
        parts += [
            "## One option changed",
            f"The chosen Energy Transformer after {options.trial_updates} updates, on the images of the tries; means "
            f"over {len(options.trial_seeds)} seed(s), `spread` the difference of the best and the worst.",
            table(("changed", "masked MSE", "spread", "training s"), lines),
        ]
    return parts


def _changed_line(name: str, rows: Sequence[Row]) -> list[str]:
    errors = [row["mse"] for row in rows]
    if None in errors:
        return [name, _error(None), "", f"{mean(rows, 'seconds'):.0f}"]
    spread = f"{max(errors) - min(errors):.4f}" if len(rows) > 1 else ""
    return [name, _error(mean(rows, "mse")), spread, f"{mean(rows, 'seconds'):.0f}"]


def thinking_of(results: Results, options: argparse.Namespace, kind: str, name: str, **key: Any) -> list[Row]:
    """The rows about thinking of every seed of a plan, of a kind: `"steps"` or `"tolerance"`."""
    about = {"most": options.most_steps, "images": min(options.thinking_images, results.settings["test_images"])}
    found = [results.find(kind=kind, name=name, seed=seed, **about, **key) for seed in options.seeds]
    return [row for row in found if row is not None]


def _about_steps(results: Results, options: argparse.Namespace) -> str:
    images = min(options.thinking_images, results.settings["test_images"])
    return (
        "Every Energy Transformer with other numbers of steps than it was trained with; no step shows what the "
        f"decoder makes of the tokens as they start. Means over the first {images} images and the seeds."
    )


def _steps_table(results: Results, plans: Sequence[Plan], options: argparse.Namespace) -> str:
    steps = [step for step in SHOWN if step <= options.most_steps]
    lines = []
    for plan in plans:
        rows = thinking_of(results, options, "steps", plan.name)
        for label, name, form in (("masked MSE", "mse", ".4f"), ("energy of an image", "energy", ",.0f")):
            cells = [format(statistics.fmean(row[name][step] for row in rows), form) for step in steps]
            lines.append([_title(plan), label, *cells])
    return table(("model", "after steps", *map(str, steps)), lines)


def _tolerance_table(results: Results, options: argparse.Namespace) -> str:
    lines = []
    for tolerance in options.tolerances:
        rows = thinking_of(results, options, "tolerance", "et", tolerance=tolerance)
        lines.append([f"{tolerance:g}", f"{mean(rows, 'steps'):.1f}", f"{mean(rows, 'mse'):.4f}"])
    return table(("tolerance", f"steps taken (at most {options.most_steps})", "masked MSE"), lines)


def notes_on(
    config: EnergyTransformerConfig, chosen: Mapping[str, Recipe], options: argparse.Namespace, settings: Row
) -> str:
    """What a reader of the table has to know."""
    height, width = config.height_and_width
    optimizer = ", ".join(f"{name} {value}" for name, value in OPTIMIZER.items())
    parts = [
        f"{settings['test_images']:,} images of {Path(options.test_data).name}, {height} x {width}, patches of "
        f"{config.patch_size}, {100 * config.mask_ratio:g} % of them masked, the same ones for every method. Trained "
        f"on {settings['train_images']:,} images of {Path(options.data).name}, {options.batch_size} an update; both "
        "models see the same images with the same masks in the same order.",
        "`masked MSE`: of the masked pixels, -1..1, clamped; mean over images and seeds, `spread` the difference of "
        "the best and the worst seed. `of variance`: over the variance of those pixels around the mean of each "
        "channel. PSNR: of the masked pixels alone, mean over images.",
        "Seconds are those of the processor in one process (so that other programs on the machine count less); "
        "`equal time` gives the MAE so many updates that it takes as long as the Energy Transformer, by the ratio of "
        "an update of each, taking turns. It has a schedule of its own length.",
        f"Both: AdamW, {optimizer}, warm-up over {100 * WARM_UP:g} % of the updates. Learning rate and settings were "
        "picked for each by as many short tries: "
        + "; ".join(
            f"{TITLES[name].split(',')[0]}: {_written(recipe)}, learning rate {recipe.learning_rate:g}"
            for name, recipe in chosen.items()
        )
        + ".",
        "Energy Transformer: " + ", ".join(f"`{value}`" for value in options.config) + "; its position embeddings "
        "start as sines and cosines, which those of the MAE are and stay, and are learned. The MAE is "
        "`ViTMAEForPreTraining` of transformers with as many parameters (`training/mae_twin.py`), which sees the "
        "visible patches alone in its encoder, once; its positions and its start are those of the MAE paper's code.",
    ]
    return "\n\n".join(parts)


__all__ = ["HEADER", "all_rows", "more_tables", "notes_on", "runs_of", "thinking_of"]
