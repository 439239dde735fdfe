"""The picture of a model card: energy and quality at every thinking step."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .card_measurements import ThinkingMeasurement


if TYPE_CHECKING:
    from matplotlib.axes import Axes

# the axis shows at least this much: differences nobody would notice must look like it
LEAST_SPAN = {"text": 0.1, "pixels": 1.0, "latents": 0.0}
QUALITY = {"text": "loss in nats per token", "latents": "loss", "pixels": "PSNR in dB"}


def _panel(axes: "Axes", first: int, values: list[float], title: str, better: str, **look: Any) -> None:
    axes.plot(range(first, first + len(values)), values, marker="o", markersize=4, **look)
    axes.set_title(f"{title} ({better} is better)" if better else title, fontsize=10)
    axes.set_xlabel("thinking steps taken")
    axes.set_xticks(range(first, first + len(values)))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def draw_thinking(measured: ThinkingMeasurement, path: Path) -> None:
    """
    Draws the mean energy (left) and the loss or PSNR (right) at every thinking step.

    Args:
        measured ([`ThinkingMeasurement`]): what to draw.
        path (`Path`): the PNG to write, about 25 kB.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    _panel(left, 0, measured.energies, "mean energy of the prediction", "", color="tab:blue")
    # energies of different landscapes cannot be compared
    for change in range(1, min(measured.landscapes, len(measured.energies) - 1)):
        label = "landscape changes" if change == 1 else None
        left.axvline(change - 0.5, color="grey", linestyle=":", label=label)
    if left.get_legend_handles_labels()[0]:
        left.legend(fontsize=8, frameon=False)
    better = "lower" if measured.psnr is None else "higher"
    _panel(right, *measured.curve, QUALITY[measured.kind], better, color="tab:orange")
    low, high = right.get_ylim()
    missing = max(0.0, LEAST_SPAN[measured.kind] - (high - low))
    right.set_ylim(low - missing / 2, high + missing / 2)
    right.axvline(measured.default_steps, color="grey", linestyle="--", label="default of this model")
    right.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=80, metadata={"Software": None})


__all__ = ["draw_thinking"]
