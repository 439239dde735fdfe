"""Pictures of pictures being completed: what was masked, what every step of thinking made of it, and the energy."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 1.35, 1.5  # inches of a picture with its title
CURVE = 1.7  # times as wide: the energy
DPI = 110
MOST_COLUMNS = 6  # completions on the way, besides the last


def plot_completion(
    results: Mapping[str, Any] | Sequence[Mapping[str, Any]], path: str | os.PathLike | None = None
) -> "Figure":
    """
    Draws results of [`ImageCompletionPipeline`]: a row for each with the original, the masked picture, the completion
    after steps 0, 1, 2, 4, ..., the completed picture, and the energy at every step.

    Args:
        results (`dict` or sequence of them): made with `output_trajectory=True`, of one number of steps; the energy is
            drawn if they were made with `output_energies=True`, too.
        path (`str` or `PathLike`, *optional*): the file to write; its ending says the format (`.png`, `.pdf`, ...).

    Returns:
        `matplotlib.figure.Figure`: without a window; a notebook shows it.

    Raises:
        ImportError: without matplotlib.
        ValueError: for no result, results without a trajectory, or of different numbers of steps.

    Example:

    ```python
    >>> import numpy as np
    >>> from transformers import pipeline
    >>> from ebt_transformers import EnergyTransformerConfig, EnergyTransformerForImageCompletion
    >>> from ebt_transformers.pipelines import plot_completion

    >>> config = EnergyTransformerConfig.for_images(
    ...     hidden_size=16, num_attention_heads=2, image_size=16, patch_size=4
    ... )
    >>> completer = pipeline("image-completion", model=EnergyTransformerForImageCompletion(config), device="cpu")
    >>> picture = np.zeros((16, 16, 3), dtype=np.uint8)
    >>> result = completer(picture, output_energies=True, output_trajectory=True)
    >>> len(plot_completion(result).axes)  # original, masked, steps 0 to 8, completed, energy
    9
    ```
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'ebt-transformers[plot]'.") from error
    rows = [results] if isinstance(results, Mapping) else list(results)
    steps = _shown_steps(rows)
    with_energy = all("energies" in row for row in rows)
    columns = 2 + len(steps)
    figure = Figure(
        figsize=(WIDTH * (columns + CURVE * with_energy), HEIGHT * len(rows) + 0.25), dpi=DPI, layout="constrained"
    )
    widths = [1.0] * columns + [CURVE] * with_energy
    grid = figure.subplots(len(rows), len(widths), squeeze=False, width_ratios=widths)
    last = steps[-1]
    for number, (row, line) in enumerate(zip(rows, grid, strict=True)):
        shown = [row["original"], row["masked_image"], *(row["trajectory"][step] for step in steps[:-1]), row["image"]]
        names = [f"{step} step{'s' if step != 1 else ''}" for step in steps[:-1]]
        titles = ["original", "masked", *names, f"completed\n({last} steps)"]
        for axes, picture, title in zip(line, shown, titles, strict=False):
            _draw_picture(axes, picture, title if number == 0 else None)
        if with_energy:
            _draw_energy(line[-1], row["energies"], number == 0, number == len(rows) - 1)
    if path is not None:
        figure.savefig(path, metadata={"Software": None} if str(path).endswith(".png") else None)
    return figure


def _shown_steps(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """The start, 1, 2, 4, ..., and the last step; of many only the last ones before the last."""
    if not rows:
        raise ValueError("There is nothing to plot: no result was given.")
    if any("trajectory" not in row for row in rows):
        raise ValueError("A result has no trajectory. Make it with `output_trajectory=True`.")
    counts = sorted({len(row["trajectory"]) - 1 for row in rows})
    if len(counts) > 1:
        raise ValueError(f"The results have different numbers of steps ({', '.join(map(str, counts))}).")
    doubled = [0, *(2**power for power in range(counts[0].bit_length()) if 2**power < counts[0])]
    return [0, *doubled[1:][-(MOST_COLUMNS - 1) :], counts[0]]


def _draw_picture(axes: "Axes", picture: Any, title: str | None) -> None:
    if isinstance(picture, Tensor):
        picture = picture.detach().cpu().permute(1, 2, 0).numpy()
    array = np.asarray(picture)
    array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    largest = 255 if np.issubdtype(array.dtype, np.integer) else 1
    axes.imshow(array, cmap="gray", vmin=0, vmax=largest, interpolation="nearest")
    axes.set_axis_off()
    if title is not None:
        axes.set_title(title, fontsize=9)


def _draw_energy(axes: "Axes", energies: Sequence[Any], first: bool, last: bool) -> None:
    """Blocks have energies of their own, which cannot be compared: each is shown by how far it has fallen."""
    blocks = energies if isinstance(energies[0], Sequence) else [energies]
    start = 0
    for block, values in enumerate(blocks):
        shown = np.asarray(values) - (values[0] if len(blocks) > 1 else 0.0)
        axes.plot(range(start, start + len(values)), shown, marker=".", markersize=4, label=f"block {block + 1}")
        start += len(values) - 1
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.locator_params(axis="x", integer=True)
    if len(blocks) > 1 and first:
        axes.legend(fontsize=6, frameon=False)
    if first:
        axes.set_title("energy" if len(blocks) == 1 else "energy lost", fontsize=9)
    if last:
        axes.set_xlabel("thinking steps", fontsize=8)


__all__ = ["plot_completion"]
