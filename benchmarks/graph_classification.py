"""Which class a graph belongs to: the Energy Transformer beside GIN, by cross-validation with the given ten folds.

    python benchmarks/graph_classification.py --data data/graphs/tu --threads 1

Settings are chosen once for each model, by validation graphs of a few folds of two sets; with them every fold of every
set is fitted. Rows are written to a file as they are measured; the same command continues where it was interrupted,
and `--fit nothing` only writes the tables of what there is.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from common import Results, add_common_options, command_line, machine_settings, report
from graph_peers.graphs import BASE, ET, GIN_NAME, MAJORITY, TRIES, GraphSet, majority, run_network
from graph_peers.plots import draw_bars
from graph_peers.rows import installed, mean_std, settings_text
from tqdm import tqdm

from ebt_transformers.reporting import of_steps, table


NAME = "graph_classification"
SETS = ("MUTAG", "PTC", "ENZYMES", "IMDB-BINARY", "PROTEINS", "IMDB-MULTI")
LIBRARIES = ("torch_geometric", "scikit-learn")
FOLDS = 10
NETWORKS = (ET, GIN_NAME)

HEADER = ("data", "model", "test", "training", "validation", "parameters", "seconds a fold", "best epoch")
TRY_HEADER = ("model", "change", "mean", "parameters", "seconds a fold")


# ---- measuring -------------------------------------------------------------------------------------------------


def row_key(data: str, model: str, fold: int, setting: dict[str, Any] | None) -> dict[str, Any]:
    """What a fit is found by."""
    return {"kind": "fit", "data": data, "model": model, "fold": fold, "setting": setting}


def tuning_rows(
    results: Results, model: str, setting: dict[str, Any], options: argparse.Namespace
) -> dict[str, list[dict[str, Any]]]:
    """The rows that judge a setting, by data set; only sets of which none is missing."""
    rows = {
        data: [results.find(**row_key(data, model, fold, setting)) for fold in range(1, options.tuning_folds + 1)]
        for data in options.tuning_sets
    }
    return {data: [row for row in of_set if row] for data, of_set in rows.items() if all(of_set)}


def tuned_accuracy(rows: dict[str, list[dict[str, Any]]]) -> float:
    """Validation accuracy, every set counting the same."""
    return statistics.fmean(statistics.fmean(row["validation"] for row in of_set) for of_set in rows.values())


def chosen(results: Results, model: str, options: argparse.Namespace) -> dict[str, Any]:
    """The setting with the highest validation accuracy on the sets for tuning; the first of equals."""
    found = {number: tuning_rows(results, model, setting, options) for number, setting in enumerate(TRIES[model])}
    complete = {
        number: tuned_accuracy(rows) for number, rows in found.items() if len(rows) == len(options.tuning_sets)
    }
    if len(complete) < len(TRIES[model]):
        raise ValueError(f"Not all settings of {model} have been tried: run this without `--fit nothing` first.")
    return TRIES[model][max(complete, key=lambda number: complete[number])]


class Fitting:
    """
    Fits what the results lack.

    Args:
        results ([`Results`]): get the rows.
        options (`argparse.Namespace`): of the command line.
    """

    def __init__(self, results: Results, options: argparse.Namespace) -> None:
        self.results, self.options = results, options
        self._sets: dict[str, GraphSet] = {}

    def data(self, name: str) -> GraphSet:
        """A data set, read once."""
        if name not in self._sets:
            self._sets[name] = GraphSet.load(self.options.data / f"{name}.npz")
            if self.results.find(kind="data", data=name) is None:
                self.results.append({"kind": "data", "data": name, **self._sets[name].about()})
        return self._sets[name]

    def fit(self, name: str, model: str, fold: int, setting: dict[str, Any] | None) -> None:
        """One model on one fold."""
        key, options = row_key(name, model, fold, setting), self.options
        if self.results.find(**key) is not None:
            return
        data = self.data(name)
        graphs = data.fold(fold)
        if setting is None:
            self.results.append({**key, "test": majority(graphs)})
            return
        found, test = run_network(model, setting, data, graphs, fold, options.epochs, options.batch_size)
        if model == ET:
            found["by_steps"] = {str(count): test(thinking_steps=count) for count in options.steps}
        self.results.append({**key, **found})

    def tune(self) -> None:
        """All settings on a few folds."""
        folds = range(1, self.options.tuning_folds + 1)
        plan = [
            (name, model, fold, setting)
            for name, model in product(self.options.tuning_sets, NETWORKS)
            for setting, fold in product(TRIES[model], folds)
        ]
        for each in tqdm(plan, desc="settings"):
            self.fit(*each)

    def compare(self) -> None:
        """All models on all folds, set by set."""
        settings = {model: chosen(self.results, model, self.options) for model in NETWORKS}
        plan = product(self.options.sets, range(1, FOLDS + 1), (MAJORITY, *NETWORKS))
        for name, fold, model in tqdm(list(plan), desc="folds"):
            self.fit(name, model, fold, settings.get(model))


# ---- tables ----------------------------------------------------------------------------------------------------


def rows_of(results: Results, data: str, model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of all folds, or none if one is missing."""
    setting = None if model == MAJORITY else chosen(results, model, options)
    rows = [results.find(**row_key(data, model, fold, setting)) for fold in range(1, FOLDS + 1)]
    return [row for row in rows if row is not None] if all(rows) else []


def percents(rows: Sequence[dict[str, Any]], name: str) -> str:
    """Mean and deviation over rows."""
    return mean_std([100 * row[name] for row in rows])


def line_of(label: str, model: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line of the table."""
    if model == MAJORITY:
        return [label, model, percents(rows, "test"), "", "", "", "", ""]
    return [
        *(label, model, percents(rows, "test"), percents(rows, "train"), percents(rows, "validation")),
        f"{rows[0]['parameters']:,}",
        f"{statistics.median(row['seconds'] for row in rows):.0f}",
        f"{statistics.fmean(row['epoch'] for row in rows):.0f}",
    ]


def tries_lines(results: Results, options: argparse.Namespace) -> list[list[str]]:
    """Every setting tried, by what it changes, with its validation accuracy on the sets for tuning."""
    lines = []
    for model in NETWORKS:
        best = chosen(results, model, options)
        for setting in TRIES[model]:
            rows = tuning_rows(results, model, setting, options)
            change = {name: value for name, value in setting.items() if value != BASE[model][name]}
            every = [row for of_set in rows.values() for row in of_set]
            accuracies = [f"{100 * statistics.fmean(row['validation'] for row in rows[name]):.1f}" for name in rows]
            mark = " (chosen)" if setting == best else ""
            lines.append(
                [
                    *(model, (settings_text(change) or "none") + mark, f"{100 * tuned_accuracy(rows):.1f}"),
                    *(f"{every[0]['parameters']:,}", f"{statistics.median(row['seconds'] for row in every):.0f}"),
                    *accuracies,
                ]
            )
    return lines


def notes_on(results: Results, options: argparse.Namespace, shown: Sequence[str]) -> str:
    """What stands before the table."""
    rows = [results.find(kind="data", data=name) for name in shown]
    about = "; ".join(
        f"{row['data']}: {row['graphs']:,} graphs ({row['in_no_fold']} in no fold), {row['classes']} classes, "
        f"{row['nodes']:,} nodes, {row['edges']:,} edges"
        for row in rows
        if row
    )
    et, gin = (settings_text(chosen(results, model, options)) for model in NETWORKS)
    return "\n\n".join(
        [
            f"Accuracy, percent, mean ± standard deviation over the {FOLDS} folds that come with the data. The graphs "
            "of a fold are for testing; of the others a tenth, stratified, validates. Graphs in no fold train or "
            f"validate only. Both networks: {options.epochs} epochs of batches of "
            f"{options.batch_size}, AdamW with a cosine schedule, label smoothing 0.05; the epoch that was best on "
            "validation counts. The fold's number is the seed. `training`: accuracy on the graphs it was trained on.",
            f"ET: {et}; two heads, twice as many memories as `hidden` in each block, read from the CLS token. "
            f"GIN (torch_geometric): {gin}; sums of all layers' nodes. These settings are the same for all sets "
            "(see below). Nodes are described by their labels and attributes; where there are none, by their degree, "
            "one-hot. `seconds`: with validation, the median, on a machine with other work.",
            "Before these tries ten settings of ET and two of GIN were compared on validation graphs of folds 1 and 2 "
            "of PTC (30 epochs): spread at the start (`init`), step size (`alpha`), blocks, width, learning rate. The "
            "base of ET comes from there; GIN's is a usual one.",
            f"{about}.",
            "The accuracies published for the Energy Transformer on such sets are, in the authors' released code, "
            "those of graphs it was trained on: they compare with no column here but `training`, and are no target.",
        ]
    )


def write_report(results: Results, options: argparse.Namespace, argv: Sequence[str] | None) -> str:
    """Draws the picture, prints and writes the tables of the sets that are complete."""
    models = (MAJORITY, *NETWORKS)
    shown = [name for name in options.sets if all(rows_of(results, name, model, options) for model in models)]
    lines, bars = [], {}
    for data in shown:
        for number, model in enumerate((*NETWORKS, MAJORITY)):
            rows = rows_of(results, data, model, options)
            lines.append(line_of(data if number == 0 else "", model, rows))
            bars["test", data, model] = [100 * row["test"] for row in rows]
    more = []
    if shown:
        picture = results.path.with_suffix(".png")
        draw_bars(picture, bars, {"test": "test accuracy"}, shown, (*NETWORKS, MAJORITY), {"test": 0.0})
        more.append(f"![Test accuracy by data set and model]({picture.name})")
        trained = chosen(results, ET, options)["T"]
        stepped = []
        for data in shown:
            rows = rows_of(results, data, ET, options)
            values = [mean_std([100 * row["by_steps"][str(count)] for row in rows]) for count in options.steps]
            stepped.append([data, *values])
        more += [
            "## Thinking steps",
            f"Test accuracy of the Energy Transformers above, trained with {of_steps(trained)} in each block, with "
            "more or fewer.",
            table(("data", *map(of_steps, options.steps)), stepped),
        ]
    more += [
        "## Every setting tried",
        f"Validation accuracy (at the best epoch) on folds 1 to {options.tuning_folds} of "
        f"{' and '.join(options.tuning_sets)}; the best mean chose. Base of ET: {settings_text(BASE[ET])}. "
        f"Base of GIN: {settings_text(BASE[GIN_NAME])}. Differences of a few percent are within chance.",
        table((*TRY_HEADER, *options.tuning_sets), tries_lines(results, options)),
    ]
    command = command_line(NAME, sys.argv[1:] if argv is None else argv)
    seeds = f"1 to {FOLDS}, that of a fold is its number"
    notes = notes_on(results, options, shown)
    return report(results, "Graph classification", command, HEADER, lines, notes, seed=seeds, more=more)


# ---- command line ----------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser, NAME, text_models=False)
    parser.add_argument("--data", type=Path, required=True, help="folder with the npz files")
    parser.add_argument("--sets", nargs="+", default=list(SETS), help="files of --data, without .npz")
    parser.add_argument("--tuning-sets", nargs="+", default=["PTC", "ENZYMES"], help="to choose settings on")
    parser.add_argument("--tuning-folds", type=int, default=3, help="so many of their folds")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 2, 3, 4, 8], help="thinking steps to compare")
    parser.add_argument("--fit", choices=("all", "nothing"), default="all", help="nothing: only write the tables")
    options = parser.parse_args(argv)
    for name in ("tuning_folds", "epochs", "batch_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if options.tuning_folds > FOLDS:
        parser.error(f"--tuning-folds must be at most {FOLDS}, got {options.tuning_folds}")
    if min(options.steps) < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    if options.device != "cpu":
        parser.error(f"--device must be cpu, got {options.device!r}")
    return options


def main(argv: Sequence[str] | None = None) -> str:
    """Fits what is missing, draws the picture and prints the tables."""
    options = parse(argv)
    settings = machine_settings(options)
    settings["versions"] |= {name: installed(name) for name in LIBRARIES}
    settings |= {name: getattr(options, name) for name in ("epochs", "batch_size", "steps")}
    results = Results(options.results, settings, options.fresh)
    if options.fit == "all":
        fitting = Fitting(results, options)
        fitting.tune()
        fitting.compare()
    return write_report(results, options, argv)


if __name__ == "__main__":
    main()
