"""Which nodes of a graph are anomalous (fraud, banned users): the Energy Transformer beside GCN, GraphSAGE and
classifiers that see no edges.

    python benchmarks/anomaly.py --data data/graphs/anomaly --threads 1

All models see the same splits and features. Every model is tried with five settings on the first split, and the one
that is best on its validation nodes is fitted on all splits. Rows are written to a file as they are measured; the same
command continues where it was interrupted.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from common import Results, add_common_options, command_line, machine_settings, report
from graph_peers.nodes import (
    ATTENTION_SPREAD,
    ET,
    NETWORKS,
    STAGES,
    Graph,
    Split,
    judge,
    run_network,
    run_on_features,
    time_updates,
)
from graph_peers.plots import draw_bars
from graph_peers.rows import installed, mean_std, settings_text
from torch import Tensor
from tqdm import tqdm

from ebt_transformers.reporting import of_steps, table


NAME = "anomaly"
SETS = ("amazon_upu", "reddit", "facebook", "books", "yelpchi_rur", "tolokers")
LIBRARIES = ("torch_geometric", "scikit-learn")
MEASURES = {"f1": "macro-F1", "auc": "AUC"}
FEWEST_ANOMALIES = 2  # in training; with fewer a share is left out

HEADER = ("data, share", "model", "macro-F1", "AUC", "parameters", "ms an epoch", "seconds", "best epoch", "setting")


def can_split(graph: Graph, share: float) -> bool:
    """Whether a share of the anomalies is enough to learn from."""
    return share * int((graph.labels == 1).sum()) >= FEWEST_ANOMALIES


# ---- measuring -------------------------------------------------------------------------------------------------


def row_key(data: str, share: float, model: str, split: int, setting: dict[str, Any]) -> dict[str, Any]:
    """What a fit is found by."""
    return {"kind": "fit", "data": data, "share": share, "model": model, "split": split, "setting": setting}


def update_key(results: Results, data: str, share: float, options: argparse.Namespace) -> dict[str, Any]:
    """What the time of an update of each network is found by."""
    networks = [model for model in options.models if model in NETWORKS]
    settings = {model: chosen(results, data, share, model) for model in networks}
    return {"kind": "update", "data": data, "share": share, "settings_of": settings}


def measure(
    model: str, setting: dict[str, Any], split: Split, seed: int, options: argparse.Namespace
) -> tuple[dict[str, Any], Callable[..., Tensor] | None]:
    """One fit: what was found, and for networks how to ask again."""
    if model not in NETWORKS:
        return run_on_features(model, setting, split, seed), None
    return run_network(model, setting, split, seed, options.hidden_size, options.epochs, options.patience)


def tries_of(results: Results, data: str, share: float, model: str) -> list[dict[str, Any]]:
    """
    The settings of a model to try on the first split, as far as its rows tell: those of a stage follow from the best
    of the stages before, which is the one with the highest AUC on the validation nodes.
    """
    best = {name: values[0] for name, values in STAGES[model].items()}
    tries = [best]
    for name, values in STAGES[model].items():
        stage = [best, *({**best, name: value} for value in values[1:])]
        tries += stage[1:]
        rows = [results.find(**row_key(data, share, model, 0, setting)) for setting in stage]
        if any(row is None for row in rows):
            break
        best = max((row for row in rows if row is not None), key=lambda row: row["validation_auc"])["setting"]
    return tries


def chosen(results: Results, data: str, share: float, model: str) -> dict[str, Any]:
    """The setting with the highest AUC on the validation nodes of the first split; the first of equals."""
    tries = tries_of(results, data, share, model)
    rows = [results.find(**row_key(data, share, model, 0, setting)) for setting in tries]
    best = max((row for row in rows if row is not None), key=lambda row: row["validation_auc"])
    return best["setting"]


class Fitting:
    """
    Fits what the results lack.

    Args:
        results ([`Results`]): get the rows.
        options (`argparse.Namespace`): of the command line.
        graphs (sequence of [`Graph`]): the data sets.
    """

    def __init__(self, results: Results, options: argparse.Namespace, graphs: Sequence[Graph]) -> None:
        self.results, self.options = results, options
        self.graphs = {graph.name: graph for graph in graphs}
        for graph in graphs:
            if results.find(kind="data", data=graph.name) is None:
                results.append({"kind": "data", "data": graph.name, **graph.about()})

    def cells(self) -> list[tuple[str, float]]:
        """Data sets and shares, without those with too few anomalies to learn from."""
        pairs = product(self.graphs, self.options.shares)
        return [(name, share) for name, share in pairs if can_split(self.graphs[name], share)]

    def fit(self, name: str, share: float, model: str, setting: dict[str, Any], seed: int) -> None:
        """One model on one split."""
        key, options = row_key(name, share, model, seed, setting), self.options
        if self.results.find(**key) is not None:
            return
        split = self.graphs[name].split(share, seed)
        found, chances = measure(model, setting, split, seed, options)
        if model == ET and chances is not None:
            found["by_steps"] = {str(count): judge(split, chances(thinking_steps=count)) for count in options.steps}
        self.results.append({**key, **found})

    def compare(self, name: str, share: float) -> None:
        """All models on all splits of one set and share."""
        results, options = self.results, self.options
        for model in options.models:
            for _ in STAGES[model]:  # each stage needs the rows of the one before
                for setting in tries_of(results, name, share, model):
                    self.fit(name, share, model, setting, 0)
            for seed in range(1, options.splits):
                self.fit(name, share, model, chosen(results, name, share, model), seed)
        key = update_key(results, name, share, options)
        if results.find(**key) is None:
            split = self.graphs[name].split(share, 0)
            results.append({**key, "seconds": time_updates(key["settings_of"], split, options.hidden_size)})


# ---- tables ----------------------------------------------------------------------------------------------------


def fits_of(results: Results, data: str, share: float, model: str, splits: int) -> list[dict[str, Any]]:
    """The rows of the chosen setting, one for each split."""
    setting = chosen(results, data, share, model)
    rows = [results.find(**row_key(data, share, model, split, setting)) for split in range(splits)]
    return [row for row in rows if row is not None]


def label_of(data: str, share: float) -> str:
    """A data set and a share in words."""
    return f"{data}, {100 * share:g} %"


def line_of(results: Results, data: str, share: float, model: str, options: argparse.Namespace) -> list[str]:
    """One line of the table."""
    rows = fits_of(results, data, share, model, options.splits)
    measures = [mean_std([100 * row[f"test_{name}"] for row in rows]) for name in MEASURES]
    parameters, speed, epochs = "", "", ""
    seconds = statistics.median(row["seconds"] for row in rows)
    if model in NETWORKS:
        parameters = f"{rows[0]['parameters']:,}"
        epochs = f"{statistics.fmean(row['epoch'] for row in rows):.0f}"
        update = results.find(**update_key(results, data, share, options))
        assert update is not None  # measured after the fits
        each = update["seconds"][model]
        speed = f"{1000 * each:.0f}"
        seconds = each * statistics.fmean(row["epochs"] for row in rows)
    setting = settings_text(rows[0]["setting"])
    return [model, *measures, parameters, speed, f"{seconds:.1f}", epochs, setting]


def steps_lines(results: Results, cells: Sequence[tuple[str, float]], options: argparse.Namespace) -> list[list[str]]:
    """What more or fewer thinking steps than trained do to the Energy Transformer."""
    lines = []
    for (data, share), measure in product(cells, MEASURES):
        rows = fits_of(results, data, share, ET, options.splits)
        values = [
            mean_std([100 * row["by_steps"][str(count)][f"test_{measure}"] for row in rows]) for count in options.steps
        ]
        lines.append([label_of(data, share), MEASURES[measure], str(rows[0]["setting"]["T"]), *values])
    return lines


def tries_lines(results: Results, cells: Sequence[tuple[str, float]], models: Sequence[str]) -> list[list[str]]:
    """Every setting that was tried, and what it came to on validation."""
    lines = []
    for (data, share), model in product(cells, models):
        tries = tries_of(results, data, share, model)
        rows = [results.find(**row_key(data, share, model, 0, setting)) for setting in tries]
        found = [f"{settings_text(row['setting'])}: {100 * row['validation_auc']:.2f}" for row in rows if row]
        lines.append([label_of(data, share), model, "; ".join(found)])
    return lines


def notes_on(results: Results, options: argparse.Namespace) -> str:
    """What stands before the table."""
    data = [results.find(kind="data", data=name) for name in options.sets]
    about = "; ".join(
        f"{row['data']}: {row['nodes']:,} nodes ({row['labelled']:,} labelled, {row['anomalies']:,} anomalous), "
        f"{row['edges']:,} edges, {row['features']} features"
        for row in data
        if row
    )
    return "\n\n".join(
        [
            f"Test nodes, percent, mean ± standard deviation over {options.splits} splits. A share of the labelled "
            "nodes trains, stratified; of the others 33 % validate and 67 % test, for all sets, also for Tolokers, "
            "which has splits of its own. The threshold of macro-F1 is the best on validation of .05, .10, ... .95. "
            f"Networks: hidden size {options.hidden_size}, Adam, the whole graph in every update, cross-entropy "
            f"weighted by normal nodes for each anomaly, at most {options.epochs} epochs, ended after "
            f"{options.patience} without a better AUC on validation; the epoch that was best there counts. The seed "
            "of a split is also that of the weights. ET: one block, one head, "
            f"{2 * options.hidden_size} memories, no positions; alpha is its step size, T its thinking steps. "
            "GCN and GraphSAGE are torch_geometric's. The last two (scikit-learn, balanced classes) see no edges.",
            "ET had more attention than the others: in a first run, with alpha 0.1 and attention matrices of spread "
            "0.02 at the start, it hardly learned from neighbours (facebook: test AUC 50.4). After that run 15 "
            "combinations of spreads, alpha, T and lr were compared on validation nodes of split 0 (facebook; three "
            f"also on reddit and amazon_upu), the spread was set to {ATTENTION_SPREAD:g}, alpha became one of "
            "ET's tries, each of the other models got a fifth try, and all of ET's fits were made anew; those of the "
            "first run are not among the rows.",
            "Each model was tried with five settings (below) on split 0; the best AUC on its validation nodes chose. "
            "Features are standardised on the training nodes and cut off at ten deviations from the mean. "
            "`ms an epoch`: one update, the networks taking turns on a machine with other work (medians); `seconds`: "
            "that times the epochs of a fit, or the fit of a classifier. `best epoch`: mean over splits.",
            f"{about}.",
            "These are not the graphs of the paper (arXiv 2302.07253), whose numbers are no yardstick here: of Amazon "
            "and YelpChi there is one relation of three, YelpChi has three prior suspicions in place of its 32 "
            "features. Amazon's nodes before its first anomaly belong to the users nobody labelled: they are in the "
            "graph and in no split. Sets and shares with fewer than "
            f"{FEWEST_ANOMALIES} anomalies in training are left out.",
        ]
    )


def write_report(results: Results, options: argparse.Namespace, cells: Sequence[tuple[str, float]], argv: Any) -> str:
    """Draws the picture, prints and writes the tables."""
    lines, bars = [], {}
    for data, share in cells:
        for number, model in enumerate(options.models):
            rows = fits_of(results, data, share, model, options.splits)
            label = label_of(data, share)
            line = line_of(results, data, share, model, options)
            lines.append([label if number == 0 else "", *line])
            for name in MEASURES:
                bars[name, label, model] = [100 * row[f"test_{name}"] for row in rows]
    picture = results.path.with_suffix(".png")
    labels = [label_of(data, share) for data, share in cells]
    draw_bars(picture, bars, MEASURES, labels, options.models, {"f1": 50.0, "auc": 50.0})
    more = [f"![macro-F1 and AUC by data set and model]({picture.name})"]
    if ET in options.models:
        header = ("data, share", "measure", "trained with", *map(of_steps, options.steps))
        text = (
            "The Energy Transformers of the first table with more or fewer thinking steps than they were trained "
            "with; the threshold is chosen anew on validation."
        )
        more += ["## Thinking steps", text, table(header, steps_lines(results, cells, options))]
    more += [
        "## Every setting tried",
        "AUC on the validation nodes of split 0, at the best epoch.",
        table(("data, share", "model", "tries"), tries_lines(results, cells, options.models)),
    ]
    seeds = f"0 to {options.splits - 1} (of splits and weights)"
    command = command_line(NAME, sys.argv[1:] if argv is None else argv)
    notes = notes_on(results, options)
    return report(results, "Anomalous nodes", command, HEADER, lines, notes, seed=seeds, more=more)


# ---- command line ----------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser, NAME, text_models=False)
    parser.add_argument("--data", type=Path, required=True, help="folder with the npz files")
    parser.add_argument("--sets", nargs="+", default=list(SETS), help="files of --data, without .npz")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.01, 0.4], help="of the nodes, for training")
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--hidden-size", type=int, default=32, help="of all networks")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--patience", type=int, default=20, help="epochs without a better validation")
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 2, 3, 4, 8], help="thinking steps to compare")
    options = parser.parse_args(argv)
    for name in ("splits", "hidden_size", "epochs", "patience"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if min(options.steps) < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    if not all(0 < share < 1 for share in options.shares):
        parser.error(f"--shares must be between 0 and 1, got {options.shares}")
    if options.device != "cpu":
        parser.error(f"--device must be cpu, got {options.device!r}: scikit-learn's classifiers run there")
    return options


def main(argv: Sequence[str] | None = None) -> str:
    """Fits what is missing, draws the picture and prints the tables."""
    options = parse(argv)
    settings = machine_settings(options)
    settings["versions"] |= {name: installed(name) for name in LIBRARIES}
    settings |= {name: getattr(options, name) for name in ("hidden_size", "epochs", "patience", "steps")}
    results = Results(options.results, settings, options.fresh)
    graphs = [Graph.load(options.data / f"{name}.npz") for name in options.sets]
    fitting = Fitting(results, options, graphs)
    cells = fitting.cells()
    for name, share in tqdm(cells, desc="data and shares"):
        fitting.compare(name, share)
    return write_report(results, options, cells, argv)


if __name__ == "__main__":
    main()
