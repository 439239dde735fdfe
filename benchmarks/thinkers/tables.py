"""What benchmarks/thinking.py makes of its rows: means, changes and tables. Not a script."""

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from thinkers.data import INSIDE, OUTSIDE, VALIDATION

from ebt_transformers.modeling_ebt.losses import perplexity
from ebt_transformers.reporting import table


LONGER = 8  # steps that every model is also judged by, best or not
PLACES = {True: INSIDE, False: OUTSIDE}
NAMES = {True: "in distribution", False: "out of distribution"}


class Curve(NamedTuple):
    """A variant, and the noise it is evaluated with."""

    name: str
    noise: float

    @property
    def label(self) -> str:
        """What tables and pictures call it."""
        return self.name if self.noise == 0 else f"{self.name}, noise {self.noise:g}"


class Found:
    """
    The rows that belong to some models, and what follows from them.

    Args:
        rows (sequence of `dict`): of the results.
        names (sequence of `str`): the variants, in the order of the tables.
        fingerprints (`dict`): of the models, by name and seed; rows of others are left out.
        options (`argparse.Namespace`): of the command line: `steps`, `candidates`, `candidate_steps` and `noise`.
        flags (`dict`): the options each variant was trained with, by name; empty for given checkpoints.
    """

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        names: Sequence[str],
        fingerprints: Mapping[tuple[str, int], str],
        options: argparse.Namespace,
        flags: Mapping[str, str],
    ) -> None:
        self.names = list(names)
        self.flags = flags
        self.options = options
        self._fingerprints = fingerprints
        own = [row for row in rows if fingerprints.get((row["name"], row.get("seed"))) == row.get("model", "")]
        self._models = {(row["name"], row["seed"]): row for row in own if row["kind"] == "model"}
        self._losses = {
            (row["name"], row["seed"], row["set"], row["candidates"], row["noise"]): row
            for row in own
            if row["kind"] == "losses"
        }
        self._difficulty = {(row["name"], row["seed"]): row for row in own if row["kind"] == "difficulty"}
        self.costs = [row for row in own if row["kind"] == "cost"]
        self.updates = {
            row["name"]: row for row in rows if row["kind"] == "update" and row["flags"] == flags.get(row["name"])
        }

    def seeds_of(self, name: str) -> list[int]:
        """Seeds that a variant was trained with."""
        return sorted(seed for other, seed in self._fingerprints if other == name)

    @property
    def seeds(self) -> list[int]:
        """All seeds."""
        return sorted({seed for _, seed in self._fingerprints})

    def model(self, name: str) -> dict[str, Any]:
        """What is known of a variant, from its first run."""
        return self._models[name, self.seeds_of(name)[0]]

    @property
    def thinkers(self) -> list[str]:
        """Variants that think."""
        return [name for name in self.names if self.model(name)["thinks"]]

    @property
    def curves(self) -> list[Curve]:
        """Variants that think, with every noise they were evaluated with."""
        asked = self.options.noise == "train"
        measured = {(name, noise) for name, _, _, _, noise in self._losses if noise == 0 or asked}
        return [Curve(name, noise) for name in self.thinkers for other, noise in sorted(measured) if other == name]

    @property
    def twins(self) -> list[str]:
        """Variants that do not think."""
        return [name for name in self.names if name not in self.thinkers]

    def steps(self, curve: Curve, candidates: int = 1) -> list[int]:
        """Numbers of steps that were asked for and measured, ascending."""
        row = self._losses.get((curve.name, self.seeds_of(curve.name)[0], INSIDE[0], candidates, curve.noise))
        asked = {0, *(self.options.steps if candidates == 1 else self.options.candidate_steps)}
        return sorted(asked & {int(count) for count in row["losses"]}) if row else []

    def each(self, curve: Curve, sets: Sequence[str], steps: int, candidates: int = 1) -> list[float]:
        """
        Perplexity of every seed: of the mean loss over the sets, each of which counts the same.

        Args:
            curve ([`Curve`]): who.
            sets (sequence of `str`): names of sets.
            steps, candidates (`int`): of thinking.
        """
        values = []
        for seed in self.seeds_of(curve.name):
            rows = [self._losses[curve.name, seed, name, candidates, curve.noise] for name in sets]
            values.append(perplexity(statistics.fmean(row["losses"][str(steps)] for row in rows)))
        return values

    def mean(self, curve: Curve, sets: Sequence[str], steps: int, candidates: int = 1) -> float:
        """Mean over seeds of [`Found.each`]."""
        return statistics.fmean(self.each(curve, sets, steps, candidates))

    def fewest(self, curve: Curve) -> int:
        """The fewest steps it was trained with; if they were not asked for, the next number above."""
        steps, trained = self.steps(curve), self.model(curve.name)["fewest"]
        return next((count for count in steps if count >= trained), steps[-1])

    def best(self, curve: Curve) -> int:
        """The number of steps, from the fewest on, with the lowest mean loss on the validation text."""
        steps = [count for count in self.steps(curve) if count >= self.fewest(curve)]
        return min(steps, key=lambda count: self.mean(curve, [VALIDATION], count))

    def longer(self, curve: Curve) -> int:
        """Eight steps, or the most there are below."""
        steps = self.steps(curve)
        return max((count for count in steps if count <= LONGER), default=steps[-1])

    def changes(self, curve: Curve, sets: Sequence[str], before: int, after: int) -> list[float]:
        """Change of perplexity in percent between two numbers of steps, for every seed."""
        pairs = zip(self.each(curve, sets, before), self.each(curve, sets, after), strict=True)
        return [change(*pair) for pair in pairs]

    def falls(self, curve: Curve, sets: Sequence[str]) -> bool:
        """Whether from the fewest trained steps on each more lowered the mean over seeds."""
        means = [self.mean(curve, sets, count) for count in self.steps(curve) if count >= self.fewest(curve)]
        return all(after < before for before, after in zip(means, means[1:], strict=False))

    def difficulty(self, name: str) -> tuple[list[float], dict[int, list[float]]] | None:
        """Means over seeds: the twin's losses by group, and the model's by steps and group; None without a twin."""
        rows = [self._difficulty.get((name, seed)) for seed in self.seeds_of(name)]
        known = [row for row in rows if row is not None]
        if not known:
            return None
        steps = self.steps(Curve(name, 0.0)) or [int(count) for count in known[0]["losses"]]
        return _means([row["twin_losses"] for row in known]), {
            count: _means([row["losses"][str(count)] for row in known]) for count in steps
        }


def _means(rows: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(values) for values in zip(*rows, strict=True)]


def change(before: float, after: float) -> float:
    """In percent; below 0 is better."""
    return 100 * (after / before - 1) if math.isfinite(before) else math.nan


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 1e4 else f"{value:.2e}"


def _percents(values: Sequence[float]) -> str:
    return ", ".join(f"{value:+.2f}" for value in values)


# ---- tables ----------------------------------------------------------------------------------------------------


def steps_lines(found: Found, inside: bool) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the table of perplexities by steps, in distribution or out of it."""
    sets = PLACES[inside]
    columns = sorted({0, *(count for curve in found.curves for count in found.steps(curve))})
    header = ["model", *("no step" if count == 0 else str(count) for count in columns)]
    header += ["monotone", "best", "fewest to best, %", f"fewest to {LONGER}, %"]
    lines = []
    for name in found.twins:
        value = _number(found.mean(Curve(name, 0.0), sets, 0))
        lines.append([name, value, *[""] * (len(header) - 2)])
    for curve in found.curves:
        measured = found.steps(curve)
        cells = [_number(found.mean(curve, sets, count)) if count in measured else "" for count in columns]
        fewest, best, longer = found.fewest(curve), found.best(curve), found.longer(curve)
        lines.append(
            [
                *(curve.label, *cells, "yes" if found.falls(curve, sets) else "no", f"{best} (from {fewest})"),
                _percents(found.changes(curve, sets, fewest, best)),
                _percents(found.changes(curve, sets, fewest, longer)),
            ]
        )
    return header, lines


def sets_table(found: Found) -> str:
    """Perplexity on every set after the fewest and the best number of steps, beside the twins'."""
    lines = []
    for place in (INSIDE, OUTSIDE):
        for name in place:
            lines += [
                [name, twin, "", _number(found.mean(Curve(twin, 0.0), [name], 0)), "", ""] for twin in found.twins
            ]
            for curve in found.curves:
                fewest, best = found.fewest(curve), found.best(curve)
                values = [_number(found.mean(curve, [name], count)) for count in (fewest, best)]
                each = _percents(found.changes(curve, [name], fewest, best))
                lines.append([name, curve.label, f"{fewest} to {best}", *values, each])
    return table(["set", "model", "steps", "fewest", "best", "change of each seed, %"], lines)


def verification_table(found: Found) -> str | None:
    """Several candidates against one, after the same steps; None where there is one only."""
    count = found.options.candidates
    lines = []
    for inside, sets in PLACES.items():
        for curve in found.curves:
            for steps in found.steps(curve, count) if count > 1 else []:
                one, several = (found.each(curve, sets, steps, number) for number in (1, count))
                means = [_number(statistics.fmean(values)) for values in (one, several)]
                each = _percents([change(*pair) for pair in zip(one, several, strict=True)])
                lines.append([curve.label, NAMES[inside], str(steps), *means, each])
    header = ["model", "where", "steps", "1 candidate", f"{count} candidates", "change of each seed, %"]
    return table(header, lines) if lines else None


def costs_table(found: Found) -> str:
    """Passes, operations and time of a prediction."""
    header = [
        "model",
        "candidates",
        "steps",
        "context readings",
        "forwards",
        "backwards",
        "FLOPs x twin",
        "time x twin",
    ]
    wanted = {found.options.candidates: {*found.options.candidate_steps}, 1: {0, *found.options.steps}}
    rows = [row for row in found.costs if row["steps"] in wanted.get(row["candidates"], ())]
    newest = {(row["name"], row["candidates"], row["steps"]): row for row in rows}
    order = sorted(newest, key=lambda key: (found.names.index(key[0]), *key[1:]))
    lines = []
    for key in order:
        row = newest[key]
        counts = [str(row[name]) for name in ("candidates", "steps", "contexts", "forwards", "backwards")]
        lines.append([row["name"], *counts, f"{row['flops_ratio']:.2f}", f"{row['seconds_ratio']:.2f}"])
    return table(header, lines)


def compute_table(found: Found) -> str | None:
    """Everybody's training and perplexity against the first twin's; None without one, or of given checkpoints."""
    if not found.twins or not found.updates:
        return None
    reference = Curve(found.twins[0], 0.0)
    of_reference = {place: found.mean(reference, sets, 0) for place, sets in PLACES.items()}
    lines = []
    for curve in [*(Curve(name, 0.0) for name in found.twins), *found.curves]:
        updates = found.model(curve.name)["updates"]
        cost = found.updates.get(curve.name, {"flops_ratio": 1.0, "seconds_ratio": 1.0})
        share = updates / found.model(reference.name)["updates"]
        compute = [f"{share * cost[name]:.2f}" for name in ("flops_ratio", "seconds_ratio")]
        counts = [0] if curve.name in found.twins else sorted({found.fewest(curve), found.best(curve)})
        for count in counts:
            values = {place: found.mean(curve, sets, count) for place, sets in PLACES.items()}
            cells = []
            for place, value in values.items():
                cells += [_number(value), "" if curve == reference else f"{change(of_reference[place], value):+.2f}"]
            steps = "" if curve.name in found.twins else str(count)
            lines.append([curve.label, steps, f"{updates:,}", *compute, *cells])
    header = ["model", "steps", "updates", "training FLOPs x twin", "training time x twin"]
    for name in NAMES.values():
        header += [name, f"against {reference.name}, %"]
    return table(header, lines)


def difficulty_table(found: Found) -> str | None:
    """Loss by steps in every group of tokens; None without twins."""
    lines = []
    columns = sorted({count for curve in found.curves for count in found.steps(curve)})
    for name in found.thinkers:
        grouped = found.difficulty(name)
        if grouped is None:
            continue
        twin, losses = grouped
        for group, of_twin in enumerate(twin):
            cells = [f"{losses[count][group]:.3f}" if count in losses else "" for count in columns]
            lines.append([name, str(group + 1), f"{of_twin:.3f}", *cells])
    header = ["model", "group", "twin", *("no step" if count == 0 else str(count) for count in columns)]
    return table(header, lines) if lines else None


def all_tables(found: Found) -> list[str]:
    """The parts of the report behind its first table."""
    parts = [f"## Perplexity by thinking steps, {NAMES[False]}", table(*steps_lines(found, inside=False))]
    parts += ["## Every set", "After the fewest trained steps and the best number of them.", sets_table(found)]
    if (text := verification_table(found)) is not None:
        why = "Starts and noise of the candidates differ; for every token the one of lowest energy is taken."
        parts += ["## Self-verification", why, text]
    if found.thinkers:
        why = (
            "Of one prediction: readings of the context (one for each landscape), then passes of candidates. "
            "Operations are those of matrix products; time is the median of turns, both in units of one forward pass "
            "of the twin on the same tokens. Measured on the first seed: neither depends on the weights."
        )
        parts += ["## What a prediction costs", why, costs_table(found)]
    if (text := compute_table(found)) is not None:
        why = (
            "An update is a forward pass, a backward pass and AdamW, with the rows that a replay buffer adds, at the "
            "mean of the numbers of steps that training draws. `twin-flops` and `twin-time` are twins with as many "
            "more updates as one of the EBT costs more, by operations and by time; they read the same text more often."
        )
        parts += ["## At equal data, operations and time", why, text]
    if (text := difficulty_table(found)) is not None:
        why = (
            f"Tokens of the sets {NAMES[True]} in five groups of one size by the loss of the twin of the same seed, "
            "the easiest first; mean loss in nats of each group, mean over seeds, without noise."
        )
        parts += ["## By difficulty", why, text]
    return parts


def notes_on(found: Found) -> str:
    """What a reader of the tables has to know."""
    options = found.options
    parts = [
        f"Perplexity on the sets {NAMES[True]} ({', '.join(INSIDE)}) and, below, {NAMES[False]} "
        f"({', '.join(OUTSIDE)}): exp of the mean loss, in which every set counts the same; mean over "
        f"{len(found.seeds)} seed(s). {options.test_tokens:,} tokens of each set, in blocks of {options.block_size} "
        "as in training, evenly spread over it. Perplexities are per token of this tokenizer, not per word.",
        "`fewest`: the fewest thinking steps a prediction was trained with. `best`: from these on, the number of "
        "steps with the lowest loss on the validation text, which is in no test set. Changes are those of each seed, "
        "in percent of the perplexity; below 0 is better. `monotone`: from the fewest on, each more step that was "
        "measured lowered the mean. `no step`: a prediction without thinking.",
    ]
    if found.flags:
        tokens = options.max_steps * options.batch_size * options.block_size
        parts.append(
            f"Trained with {options.max_steps:,} updates of {options.batch_size} x {options.block_size} tokens "
            f"({tokens:,} in all) on {', '.join(sorted(options.train_sets))}, preset {options.preset}; a byte-level "
            f"tokenizer of {options.vocab_size:,} tokens learned from the same text. The variants: "
            + "; ".join(f"{name}: `{said}`" for name, said in found.flags.items())
            + "."
        )
    sizes = ", ".join(f"{name} {found.model(name)['parameters']:,}" for name in found.names)
    return "\n\n".join([*parts, f"Parameters: {sizes}."])


__all__ = [
    "Curve",
    "Found",
    "all_tables",
    "change",
    "compute_table",
    "costs_table",
    "difficulty_table",
    "notes_on",
    "sets_table",
    "steps_lines",
    "verification_table",
]
