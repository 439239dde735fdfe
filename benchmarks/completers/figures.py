"""The pictures of benchmarks/completion.py. Not a script."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from denoisers.pictures import to_unit
from matplotlib.figure import Figure
from torch import Tensor


if TYPE_CHECKING:
    from matplotlib.axes import Axes

INCH = 0.95  # side of an image
ET_COLOUR, MAE_COLOUR, GREY = "#d55e00", "#0072b2", "#6b6b6b"  # colour-blind safe (Okabe and Ito)
MASKED_GREY = 0.0  # of masked pixels, in -1..1


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
    path: Path, rows: Sequence[Mapping[str, Any]], tolerances: Sequence[Mapping[str, Any]], trained: int, mae: float
) -> None:
    """
    Masked error and energy against thinking steps, of every seed.

    Args:
        path (`Path`): of the picture.
        rows (sequence of `dict`): `mse` and `energy` after 0, 1, 2, ... steps.
        tolerances (sequence of `dict`): where a tolerance stopped: `steps` and `mse`.
        trained (`int`): steps in training.
        mae (`float`): error of the twin.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for row in rows:
        steps = range(len(row["mse"]))
        left.plot(steps, row["mse"], color=ET_COLOUR, linewidth=1.2)
        right.plot(steps, row["energy"], color=ET_COLOUR, linewidth=1.2)
    left.plot([], [], color=ET_COLOUR, label="ET, each seed")
    left.plot(
        [row["steps"] for row in tolerances],
        [row["mse"] for row in tolerances],
        "k*",
        markersize=8,
        label="stopped by a tolerance",
    )
    left.axhline(mae, color=MAE_COLOUR, linestyle="--", label="MAE, equal updates")
    for axes, name in ((left, "masked MSE (-1..1)"), (right, "energy of an image")):
        axes.axvline(trained, color=GREY, linestyle=":", label="steps in training")
        axes.set(xlabel="thinking steps", ylabel=name, xscale="symlog")
        axes.set_xticks([0, 1, 2, 4, 8, 16, 32, 64][: len(bin(len(rows[0]["mse"]))) - 1])
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(_no_ticks())
        axes.grid(alpha=0.25)
    left.set_yscale("log")
    left.yaxis.set_minor_formatter("{x:g}")
    left.yaxis.set_major_formatter("{x:g}")
    left.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


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
        curve.plot(energies[number].tolist(), color=ET_COLOUR, linewidth=1.2)
        curve.axvline(trained, color=GREY, linestyle=":")
        curve.tick_params(labelsize=6)
        if number == 0:
            curve.set_title("energy by step", fontsize=8)
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.01)  # type: ignore[union-attr]
    figure.savefig(path, dpi=150)


__all__ = ["draw_rows", "draw_steps", "draw_thinking"]
