"""The pictures of benchmarks/thinking.py. Not a script."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from thinkers.tables import NAMES, PLACES, Curve, Found


if TYPE_CHECKING:
    from matplotlib.axes import Axes

LARGEST_CHANGE = 15.0  # percent: descents that run away would hide all others
TWIN_STYLES = ("--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))


def _ticks(axes: "Axes", columns: Sequence[int]) -> None:
    axes.set_xticks(range(len(columns)), [str(count) for count in columns])
    axes.grid(alpha=0.3)


def _plot_perplexity(axes: "Axes", found: Found, inside: bool, columns: Sequence[int]) -> None:
    """Perplexities of all seeds and their mean; the twins as horizontal lines."""
    sets = PLACES[inside]
    for number, curve in enumerate(found.curves):
        steps = found.steps(curve)
        places = [columns.index(count) for count in steps]
        each = list(zip(*(found.each(curve, sets, count) for count in steps), strict=True))
        for values in each:
            axes.plot(places, values, color=f"C{number}", linewidth=0.6, alpha=0.6)
        means = [found.mean(curve, sets, count) for count in steps]
        axes.plot(places, means, "o-", color=f"C{number}", markersize=4, label=curve.label)
    for style, name in zip(TWIN_STYLES * len(found.twins), found.twins, strict=False):
        axes.axhline(found.mean(Curve(name, 0.0), sets, 0), color="black", linestyle=style, linewidth=1, label=name)
    axes.set(title=NAMES[inside][0].upper() + NAMES[inside][1:], yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="y", which="both", labelsize=8)


def _plot_change(axes: "Axes", found: Found, inside: bool, columns: Sequence[int]) -> None:
    """Change since the fewest steps of training, in percent, on an axis of its own: levels differ by more."""
    sets = PLACES[inside]
    for number, curve in enumerate(found.curves):
        steps, fewest = found.steps(curve), found.fewest(curve)
        places = [columns.index(count) for count in steps]
        changes = list(zip(*(found.changes(curve, sets, fewest, count) for count in steps), strict=True))
        for values in changes:
            axes.plot(places, values, color=f"C{number}", linewidth=0.6, alpha=0.6)
        means = [sum(values) / len(values) for values in zip(*changes, strict=True)]
        axes.plot(places, means, "o-", color=f"C{number}", markersize=4)
        axes.plot(columns.index(fewest), 0, "s", color=f"C{number}", markersize=8, markerfacecolor="none")
    axes.axhline(0, color="grey", linewidth=0.8)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -LARGEST_CHANGE), min(high, LARGEST_CHANGE))


def draw_steps(path: Path, found: Found) -> None:
    """
    Perplexity against thinking steps, in and out of distribution; below, its change since the fewest trained steps.

    Args:
        path (`Path`): of the picture.
        found ([`Found`]): what was measured.
    """
    from matplotlib.figure import Figure

    columns = sorted({count for curve in found.curves for count in found.steps(curve)}) or [0]
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True)
    for column, inside in enumerate(PLACES):
        upper, lower = grid[0][column], grid[1][column]
        _plot_perplexity(upper, found, inside, columns)
        _plot_change(lower, found, inside, columns)
        for axes in (upper, lower):
            _ticks(axes, columns)
        lower.set_xlabel("thinking steps")
    grid[0][0].set_ylabel("perplexity")
    grid[1][0].set_ylabel("change since the fewest\ntrained steps (square), %")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    about = "Thin lines: seeds. Thick lines: their mean. Black: models that do not think. "
    figure.suptitle(f"{about}Changes beyond {LARGEST_CHANGE:g} % are cut off.", fontsize=10)
    figure.savefig(path, dpi=120)


def draw_difficulty(path: Path, found: Found) -> bool:
    """
    Change of the loss by thinking steps, for tokens that are easy to hard for the twin.

    Args:
        path (`Path`): of the picture.
        found ([`Found`]): what was measured.

    Returns:
        `bool`: whether there was anything to draw: models that think, and a twin.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    shown = {name: grouped for name in found.thinkers if (grouped := found.difficulty(name)) is not None}
    if not shown:
        return False
    wide = min(3, len(shown))
    tall = math.ceil(len(shown) / wide)
    figure = Figure(figsize=(4.2 * wide + 1.5, 3.6 * tall + 0.8), layout="constrained")
    panels = figure.subplots(tall, wide, squeeze=False).flatten()
    for axes, (name, (twin, losses)) in zip(panels, shown.items(), strict=False):
        steps = list(losses)
        fewest = found.fewest(Curve(name, 0.0))
        for group, of_twin in enumerate(twin):
            values = [losses[count][group] - losses[fewest][group] for count in steps]
            colour = colormaps["viridis"](group / max(1, len(twin) - 1) * 0.9)
            axes.plot(range(len(steps)), values, "o-", color=colour, markersize=4, label=f"{of_twin:.2f}")
        axes.plot(steps.index(fewest), 0, "s", color="grey", markersize=9, markerfacecolor="none")
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set(title=name, xlabel="thinking steps")
        _ticks(axes, steps)
        axes.legend(title="loss of the twin", fontsize=7, title_fontsize=7)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    for axes in panels[::wide]:
        axes.set_ylabel("change of the loss since the\nfewest trained steps (square), nats")
    figure.suptitle(
        "Tokens in five groups by difficulty, in distribution. Below 0: thinking longer helps.", fontsize=10
    )
    figure.savefig(path, dpi=120)
    return True


__all__ = ["draw_difficulty", "draw_steps"]
