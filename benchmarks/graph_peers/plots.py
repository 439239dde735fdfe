"""The pictures of the benchmarks on graphs. Not a script."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path


def draw_bars(
    path: Path,
    values: Mapping[tuple[str, str, str], Sequence[float]],
    measures: Mapping[str, str],
    groups: Sequence[str],
    models: Sequence[str],
    floors: Mapping[str, float],
) -> None:
    """
    A panel for each measure, a group of bars for each data set, a bar for each model, with its standard deviation.

    Args:
        path (`Path`): of the picture.
        values (mapping): percents by measure, group and model.
        measures (mapping): what each measure is called.
        groups, models (sequences of `str`): in the order shown.
        floors (mapping): where the axis of each measure begins.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(7.0, 1.1 * len(groups) + 1.5), 3.4 * len(measures) + 0.6), layout="constrained")
    panels = figure.subplots(len(measures), 1, sharex=True, squeeze=False)[:, 0]
    wide = 0.8 / len(models)
    for axes, (measure, title) in zip(panels, measures.items(), strict=True):
        for number, model in enumerate(models):
            found = [values[measure, group, model] for group in groups]
            places = [place + (number - (len(models) - 1) / 2) * wide for place in range(len(groups))]
            spreads = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in found]
            means = [statistics.fmean(each) for each in found]
            error = {"elinewidth": 0.8, "capsize": 2}
            axes.bar(places, means, wide, yerr=spreads, color=f"C{number}", label=model, error_kw=error)
        axes.set_ylim(floors[measure], None)
        axes.set_ylabel(f"{title}, %")
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    labels = [group.replace(", ", "\n") for group in groups]
    panels[-1].set_xticks(range(len(groups)), labels, fontsize=8)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(models))
    figure.savefig(path, dpi=120)


__all__ = ["draw_bars"]
