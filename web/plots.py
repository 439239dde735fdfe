"""The pictures of the web demonstration: pure functions from what was watched to matplotlib figures."""

import json
from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..demo import finish_axes
from .denoising import PictureWalk
from .text import TokenWalk, entropy, top_tokens


# tell apart with every kind of colour vision, and in grey
CHOSEN, OTHER = "tab:blue", "tab:orange"
FAINT = 0.35
TOKENS_SHOWN = 8
BAR_WIDTH = 0.82  # of the room a step has
DPI = 110
LABELLED_COLUMNS = 10  # more of them leave no room for numbers beside the bars


def quoted(text: str) -> str:
    """A token as it can be read in one line: quoted, line breaks as `\\n`. Dollar signs mean mathematics to plots."""
    return json.dumps(text, ensure_ascii=False).replace("$", r"\$")


def _draw_bars(axes: Axes, shares: list[float], step: int, row: int, color: str, labelled: bool) -> None:
    """The bar of one token at one step: its length is a share of the room there, its label the probability."""
    share, probability = shares
    axes.barh(row, BAR_WIDTH * share, left=step, color=color, height=0.7, snap=False)
    if labelled and probability >= 0.005:
        inside = share > 0.6
        axes.text(
            step + BAR_WIDTH * share + (-0.03 if inside else 0.03),
            row,
            f"{100 * probability:.0f} %" if probability < 0.995 else "100 %",
            ha="right" if inside else "left",
            va="center",
            fontsize=8,
            color="white" if inside else "black",
        )


def draw_distributions(walk: TokenWalk, token: int, decode: Callable[[int], str]) -> Figure:
    """
    The likeliest tokens of a walk, and how likely they are at its start and after every step.

    Args:
        walk ([`TokenWalk`]): of one token.
        token (`int`): the one that was generated; it stands out.
        decode (`Callable`): token -> text.

    Returns:
        `matplotlib.figure.Figure`: a column of bars for every step, a row for every token.
    """
    rows = top_tokens(walk.distributions, TOKENS_SHOWN, token, first=0 if walk.starts_at_prediction else 1)
    shown = walk.distributions[:, rows]
    longest = float(shown.max())
    columns = len(shown)
    figure = Figure(figsize=(9, 0.34 * len(rows) + 1.4), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for step, probabilities in enumerate(shown.tolist()):
        for row, probability in enumerate(probabilities):
            color = OTHER if rows[row] == token else CHOSEN
            _draw_bars(axes, [probability / longest, probability], step, row, color, columns <= LABELLED_COLUMNS)
        axes.axvline(step, color="grey", linewidth=0.8)
    names = [quoted(decode(one)) for one in rows]
    axes.set_yticks(range(len(rows)), names, family="monospace", fontsize=10)
    axes.get_yticklabels()[rows.index(token)].set_color(OTHER)
    axes.get_yticklabels()[rows.index(token)].set_fontweight("bold")
    axes.invert_yaxis()
    spreads = entropy(walk.distributions).tolist()
    labels = [f"{step or 'start'}\n{spread:.2f}" for step, spread in enumerate(spreads)]
    axes.set_xticks([step + BAR_WIDTH / 2 for step in range(columns)], labels)
    axes.tick_params(length=0)
    axes.set_xlim(-0.02, columns)
    axes.set_xlabel(f"thinking steps taken, and below the entropy in nats (longest bar: {100 * longest:.0f} %)")
    axes.spines[:].set_visible(False)
    axes.set_title("The likeliest tokens of the candidate (orange: the token generated)")
    return figure


def _draw_candidates(axes: Axes, walk: TokenWalk, steps: range, title: str) -> None:
    """The energies at some of the steps: a line for every candidate."""
    others = [row for row in range(len(walk.energies)) if row != walk.chosen]
    for row in others:
        label = "other candidates" if row == others[0] else None
        axes.plot(steps, walk.energies[row, steps], color=OTHER, alpha=FAINT, marker=".", label=label)
    label = "the candidate kept" if others else "the candidate"
    axes.plot(steps, walk.energies[walk.chosen, steps], color=CHOSEN, linewidth=2.2, marker="o", label=label)
    axes.set(title=title, ylabel="energy")


def draw_energies_of_candidates(walk: TokenWalk, first: int) -> Figure:
    """
    The energy of every candidate of a token on its way down.

    Args:
        walk ([`TokenWalk`]): of one token.
        first (`int`): which energy is the first on the last landscape. Those before it cannot be compared with it:
            where there are any, a second plot shows what the last landscape did alone.

    Returns:
        `matplotlib.figure.Figure`: one line for each candidate; the one that was kept is strong.
    """
    steps = range(walk.energies.shape[1])
    title = "The energy of its candidates"
    figure = Figure(figsize=(6, 4.12), dpi=DPI, layout="constrained")
    if first == 0:
        axes = figure.subplots()
        _draw_candidates(axes, walk, steps, title)
        finish_axes(axes, steps)
        return figure
    above, below = figure.subplots(2, 1, height_ratios=[2, 3])
    _draw_candidates(above, walk, steps, title)
    finish_axes(above, steps, first + 1)
    above.set_xlabel("")
    _draw_candidates(below, walk, steps[first:], f"{title} on the last landscape")
    finish_axes(below, steps[first:])
    below.get_legend().remove()  # that of the plot above
    return figure


def draw_denoising_curves(walk: PictureWalk) -> Figure:
    """
    Energy and PSNR of a picture against thinking steps.

    Args:
        walk ([`PictureWalk`]): of one picture.

    Returns:
        `matplotlib.figure.Figure`: two plots side by side; the best PSNR is marked.
    """
    steps = range(len(walk.energies))
    figure = Figure(figsize=(10, 3.4), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(steps, walk.energies, color=CHOSEN, linewidth=2.2, marker="o", label="mean energy of the tiles")
    left.set_title("Energy of the picture")
    left.set_ylabel("energy")
    right.plot(steps, walk.psnrs, color=CHOSEN, linewidth=2.2, marker="o", label="PSNR to the clean picture")
    best = max(steps, key=lambda step: walk.psnrs[step])
    right.plot(best, walk.psnrs[best], color=OTHER, marker="o", markersize=10, linestyle="", label="best")
    right.set_title("Quality of the picture")
    right.set_ylabel("PSNR in dB")
    for axes in (left, right):
        finish_axes(axes, steps)
    return figure


__all__ = ["draw_denoising_curves", "draw_distributions", "draw_energies_of_candidates", "quoted"]
