"""Pictures of the benchmark: images side by side, and quality against passes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


# colour-blind safe (Okabe and Ito); EBTs warm, DiTs cold, classical methods grey
EBT_COLOURS = ("#d55e00", "#e69f00", "#cc79a7", "#8c4a00")
DIT_COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#003f63")
GREY = "#6b6b6b"
DASHES = ("-", "--", ":", "-.")


@dataclass
class Curve:
    """
    One line of the plot.

    Args:
        method (`str`): whose colour it has.
        protocol (`str`): which kind of line; `"target"` is a point, `"fair"` dashed.
        kind (`str`): `"ebt"`, `"dit"` or `"classical"`; the last has a level instead of a curve.
        points (mapping of passes to PSNR): what was measured.
    """

    method: str
    protocol: str
    kind: str
    points: Mapping[float, float]

    @property
    def label(self) -> str:
        """In the legend."""
        return f"{self.method} ({self.protocol})" if self.protocol else self.method


def plot_passes(path: Path, panels: Mapping[str, Sequence[Curve]]) -> None:
    """PSNR against passes, a panel for each noise level."""
    figure = Figure(figsize=(5.2 * len(panels), 4.4), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(panels)))
    handles = {}
    of_kind = {"ebt": iter(EBT_COLOURS * 9), "dit": iter(DIT_COLOURS * 9)}
    colours: dict[str, str] = {}
    for curve in (curve for curves in panels.values() for curve in curves if curve.kind != "classical"):
        if curve.method not in colours:
            colours[curve.method] = next(of_kind[curve.kind])
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        dashes = iter(DASHES * 9)
        for curve in curves:
            if curve.kind == "classical":
                line = axis.axhline(curve.points[0], color=GREY, linestyle=next(dashes), linewidth=1.2)
            else:
                passes = sorted(curve.points)
                values = [curve.points[count] for count in passes]
                marker = "*" if curve.protocol == "target" else "o" if curve.kind == "ebt" else "s"
                (line,) = axis.plot(
                    passes,
                    values,
                    color=colours[curve.method],
                    linestyle="--" if curve.protocol == "fair" else "-",
                    marker=marker,
                    markersize=13 if marker == "*" else 5,
                    markeredgecolor="black" if marker == "*" else None,
                    linewidth=2,
                    zorder=3 if marker == "*" else 2,
                )
            handles.setdefault(curve.label, line)
        axis.set_xscale("log")
        axis.set_xlim(0.85, 360)
        ticks = (1, 2, 4, 8, 20, 50, 100, 300)
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("passes of the network on an image")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("PSNR in dB")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def draw_grid(path: Path, title: str, columns: Sequence[tuple[str, np.ndarray, Sequence[float] | None]]) -> None:
    """
    Images side by side.

    Args:
        path (`Path`): the PNG.
        title (`str`): over everything.
        columns (sequence of name, images, PSNRs): images (N, H, W) or (N, H, W, C) in 0..1, one a row; below each its
            PSNR.
    """
    rows = len(columns[0][1])
    figure = Figure(figsize=(1.55 * len(columns), 1.75 * rows + 0.6), layout="constrained")
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for column, (name, images, quality) in enumerate(columns):
        axes[0, column].set_title(name, fontsize=10)
        for row in range(rows):
            axis = axes[row, column]
            axis.imshow(np.clip(images[row], 0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if quality is not None:
                axis.set_xlabel(f"{quality[row]:.1f} dB", fontsize=8, labelpad=2)
    figure.savefig(path, dpi=150)


__all__ = ["Curve", "draw_grid", "plot_passes"]
