"""The pictures of benchmarks/completion.py. Not a script."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from denoisers.pictures import to_unit
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import Tensor


if TYPE_CHECKING:
    from matplotlib.axes import Axes

INCH = 0.95  # side of an image
# colour-blind safe (Okabe and Ito)
ET_COLOURS = ("#d55e00", "#009e73", "#cc79a7", "#8c4a00")
MAE_COLOUR, GREY = "#0072b2", "#6b6b6b"
TICKS = (0, 1, 2, 4, 8, 16, 32, 64, 128)


def _show(axes: "Axes", image: Tensor) -> None:
    picture = to_unit(image[None].clamp(-1, 1))[0]
    axes.imshow(picture, cmap="gray" if picture.ndim == 2 else None, vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set_visible(False)


def draw_rows(path: Path, rows: Mapping[str, Tensor]) -> None:
    """
    Images side by side, a row for each method.

    Args:
        path (`Path`): of the picture.
        rows (mapping of names to `torch.FloatTensor` of shape `(B, C, H, W)`): the same images, -1..1.
    """
    count = min(len(images) for images in rows.values())
    figure = Figure(figsize=(INCH * count + 1.1, INCH * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), count, squeeze=False)
    for line, (name, images) in zip(grid, rows.items(), strict=True):
        for axes, image in zip(line, images, strict=False):
            _show(axes, image)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.01)  # type: ignore[union-attr]
    figure.savefig(path, dpi=150)


def draw_steps(
    path: Path, curves: Mapping[int, Sequence[Mapping[str, Any]]], tolerances: Sequence[Mapping[str, Any]], mae: float
) -> None:
    """
    Masked error and energy against thinking steps, of every seed.

    Args:
        path (`Path`): of the picture.
        curves (mapping of steps in training to sequences of `dict`): `mse` and `energy` after 0, 1, 2, ... steps.
        tolerances (sequence of `dict`): where a tolerance stopped: `steps` and `mse`.
        mae (`float`): error of the twin.
    """
    figure = Figure(figsize=(9.5, 3.7), layout="constrained")
    left, right = figure.subplots(1, 2)
    most = max(len(row["mse"]) for rows in curves.values() for row in rows) - 1
    for (trained, rows), colour in zip(curves.items(), ET_COLOURS * len(curves), strict=False):
        for axes, name in ((left, "mse"), (right, "energy")):
            axes.axvline(trained, color=colour, linestyle=":", linewidth=1)
            for number, row in enumerate(rows):
                label = f"ET trained with {trained} steps (dotted)" if number == 0 else None
                axes.plot(range(len(row[name])), row[name], color=colour, linewidth=1.2, label=label)
    if tolerances:
        taken, errors = ([row[name] for row in tolerances] for name in ("steps", "mse"))
        left.plot(taken, errors, "k*", markersize=7, linestyle="", label="stopped by a tolerance")
    left.axhline(mae, color=MAE_COLOUR, linestyle="--", label="MAE, equal updates")
    for axes, name in ((left, "masked MSE (-1..1)"), (right, "energy of an image")):
        axes.set(xlabel="thinking steps", ylabel=name, xscale="symlog", xlim=(-0.15, 1.08 * most))
        axes.set_xticks([step for step in TICKS if step <= most])
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.25)
    left.set_yscale("log")
    left.yaxis.set_minor_formatter("{x:g}")
    left.yaxis.set_major_formatter("{x:g}")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def draw_thinking(
    path: Path, images: Tensor, masked: Tensor, walks: Tensor, energies: Tensor, counts: Sequence[int], trained: int
) -> None:
    """
    Completions after some numbers of steps, and the energy of each image.

    Args:
        path (`Path`): of the picture.
        images, masked (`torch.FloatTensor` of shape `(B, C, H, W)`): the truth, and what is visible of it.
        walks (`torch.FloatTensor` of shape `(B, T + 1, C, H, W)`): completions after every step.
        energies (`torch.FloatTensor` of shape `(B, T + 1)`): of every image.
        counts (sequence of `int`): which steps to show.
        trained (`int`): steps in training.
    """
    columns = 2 + len(counts)
    figure = Figure(figsize=(INCH * columns + 2.6, INCH * len(images) + 0.3), layout="constrained")
    grid = figure.subplots(len(images), columns + 1, squeeze=False, width_ratios=[1] * columns + [2])
    for number, line in enumerate(grid):
        shown = [images[number], masked[number], *(walks[number, count] for count in counts)]
        titles = ["original", "masked", *(f"{count} steps" if count != 1 else "1 step" for count in counts)]
        for axes, image, title in zip(line, shown, titles, strict=False):
            _show(axes, image)
            if number == 0:
                axes.set_title(title, fontsize=8)
        curve = line[-1]
        curve.plot(energies[number].tolist(), color=ET_COLOURS[0], linewidth=1.2)
        curve.axvline(trained, color=GREY, linestyle=":")
        curve.tick_params(labelsize=6)
        if number == 0:
            curve.set_title("energy by step", fontsize=8)
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.01)  # type: ignore[union-attr]
    figure.savefig(path, dpi=150)


__all__ = ["draw_rows", "draw_steps", "draw_thinking"]
