"""Laws of the benchmarks on graphs: they run, resume, choose by validation only, and their tables are their rows."""

import importlib
import json
import re
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch


pytest.importorskip("datasets")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("torch_geometric")

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Imports a benchmark as running it would."""
    own = {path.stem for path in FOLDER.iterdir()}

    def modules():
        return [name for name in sys.modules if name.split(".")[0] in own]

    monkeypatch.syspath_prepend(str(FOLDER))
    for name in modules():
        monkeypatch.delitem(sys.modules, name)
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)
    for name in modules():
        del sys.modules[name]


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def cells_of(text: str, title: str, first: str, second: str) -> list[str]:
    """The cells of the first line that begins with these two, in the part of a report that begins with `title`."""
    part = text[text.index(title) :]
    line = next(line for line in part.splitlines() if re.match(rf"\| {re.escape(first)} *\| *{second} ", line))
    return [cell.strip() for cell in line.strip("|").split("|")]


# ---- nodes -----------------------------------------------------------------------------------------------------


@pytest.fixture
def nodes(tmp_path) -> Path:
    """A graph of 80 nodes, a quarter anomalous, that are told apart by their first feature."""
    folder = tmp_path / "anomaly"
    folder.mkdir()
    draw = np.random.default_rng(0)
    labels = np.arange(80) % 4 == 3
    features = draw.normal(size=(80, 3)) + labels[:, None] * np.array([1.5, 0.0, 0.0])
    values = {
        "x": features.astype(np.float32),
        "y": labels.astype(np.int8),
        "edge_index": draw.integers(80, size=(2, 160)),
    }
    for name in ("small", "amazon_upu"):
        np.savez(folder / f"{name}.npz", **values)
    return folder


def test_anomaly_runs_resumes_and_says_what_its_rows_say(script, nodes, tmp_path, monkeypatch):
    anomaly = script("anomaly")
    path = tmp_path / "rows.jsonl"
    argv = ["--data", str(nodes), "--sets", "small", "--shares", "0.02", "0.4", "--splits", "2", "--hidden-size", "8"]
    argv += ["--epochs", "3", "--steps", "1", "2", "3", "--threads", "1", "--results", str(path)]
    text = anomaly.main(argv)
    rows = rows_of(path)
    assert path.with_suffix(".md").read_text() == text
    assert path.with_suffix(".png").stat().st_size > 5_000 and "(rows.png)" in text
    for part in ("machine", "torch_geometric 2", "seed: 0 to 1", "python benchmarks/anomaly.py --data"):
        assert part in text
    assert "small, 2 %" not in text  # not even one anomaly could train

    fits = [row for row in rows if row["kind"] == "fit"]
    assert len(fits) == 5 * (5 + 1)  # five tries on the first split, the best of them on the second
    for model, stages in anomaly.STAGES.items():
        tried = [row for row in fits if row["model"] == model and row["split"] == 0]
        best = max(tried, key=lambda row: row["validation_auc"])
        (second,) = [row for row in fits if row["model"] == model and row["split"] == 1]
        assert second["setting"] == best["setting"]
        assert {name: values[0] for name, values in stages.items()} in [row["setting"] for row in tried]
        cells = cells_of(text, "# Anomalous", "small, 40 %" if model == "ET" else "", model)
        for cell, name in zip(cells[2:4], ("f1", "auc"), strict=True):
            values = [100 * row[f"test_{name}"] for row in (best, second)]
            assert cell == f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"
    for row in (row for row in fits if row["model"] == "ET"):
        assert row["by_steps"][str(row["setting"]["T"])]["test_auc"] == pytest.approx(row["test_auc"])

    monkeypatch.setattr(anomaly, "measure", lambda *args: pytest.fail("measured again"))
    assert anomaly.main(argv) == text
    assert rows_of(path) == rows


def test_settings_are_chosen_without_the_test_nodes(script, nodes, tmp_path, monkeypatch):
    anomaly = script("anomaly")
    peers = script("graph_peers.nodes")
    argv = ["--data", str(nodes), "--sets", "small", "--shares", "0.4", "--splits", "1", "--hidden-size", "8"]
    argv += ["--epochs", "3", "--steps", "1", "--threads", "1", "--models", "ET", "logistic regression"]
    anomaly.main([*argv, "--results", str(tmp_path / "true.jsonl")])
    split = peers.Graph.split

    def lie(self, share, seed):
        found = split(self, share, seed)
        labels = found.labels.clone()
        labels[found.test] = 1 - labels[found.test]
        return replace(found, labels=labels)

    monkeypatch.setattr(peers.Graph, "split", lie)
    anomaly.main([*argv, "--results", str(tmp_path / "lie.jsonl")])
    for true, lied in zip(rows_of(tmp_path / "true.jsonl"), rows_of(tmp_path / "lie.jsonl"), strict=True):
        for name in ("setting", "split", "epoch", "threshold", "validation_auc", "validation_f1"):
            assert true.get(name) == lied.get(name)
        if true["kind"] == "fit":
            assert lied["test_auc"] == pytest.approx(1 - true["test_auc"])


def test_splits_and_features(script, nodes):
    graphs = script("graph_peers.nodes").Graph
    graph = graphs.load(nodes / "small.npz")
    split = graph.split(0.4, seed=0)
    parts = [split.train, split.validation, split.test]
    assert sorted(torch.cat(parts).tolist()) == list(range(80))
    assert [int(graph.labels[part].sum()) for part in parts] == [8, 4, 8]
    assert split.weight == 3
    torch.testing.assert_close(split.features[split.train].mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    # of the Amazon set, what precedes the first anomaly has no label
    amazon = graphs.load(nodes / "amazon_upu.npz")
    assert amazon.labels[:3].tolist() == [-100] * 3 and amazon.labels[3] == 1
    assert not set(torch.cat([*vars(amazon.split(0.4, 0)).values()][3:]).tolist()) & {0, 1, 2}


def test_the_best_epoch_is_kept_and_patience_ends(script, nodes):
    peers = script("graph_peers.nodes")
    split = peers.Graph.load(nodes / "small.npz").split(0.4, 0)
    for model, setting in (
        ("ET", {"T": 2, "alpha": 0.1, "lr": 0.01}),
        ("GCN", {"dropout": 0.5, "layers": 2, "lr": 0.01}),
    ):
        torch.manual_seed(0)
        network = peers.make_network(model, setting, 3, 8)
        found = peers.fit_network(network, split, 0.01, epochs=15, patience=3, random=model == "GCN")
        assert found["epochs"] == min(15, found["epoch"] + 3)
        with torch.no_grad():
            chances = peers.logits_of(network, split).softmax(-1)[:, 1]
        torch.manual_seed(0)
        again = peers.run_network(model, setting, split, 0, 8, 15, 3)[0]
        assert again["validation_auc"] == pytest.approx(peers.judge(split, chances)["validation_auc"])


def test_thresholds_are_those_of_the_best_f1(script):
    peers = script("graph_peers.nodes")
    labels = np.array([0, 0, 0, 1, 1])
    assert 0.25 < peers.best_threshold(labels, np.array([0.1, 0.2, 0.28, 0.32, 0.9])) < 0.32


# ---- graphs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def molecules(tmp_path) -> Path:
    """Forty rings and paths of 4 nodes; four of them are in no fold."""
    folder = tmp_path / "tu"
    folder.mkdir()
    edges = [[], []]
    for graph in range(44):
        pairs = [(0, 1), (1, 2), (2, 3)] + [(3, 0)] * (graph % 2)
        for a, b in pairs:
            edges[0] += [4 * graph + a, 4 * graph + b]
            edges[1] += [4 * graph + b, 4 * graph + a]
    values = {
        "y": np.arange(44) % 2,
        "graph_id": np.repeat(np.arange(44), 4),
        "node_label": np.tile([0, 1, 1, 2], 44),
        "edge_index": np.array(edges),
        "test_fold": np.array([1 + i // 4 for i in range(40)] + [-1] * 4),
    }
    np.savez(folder / "RINGS.npz", **values)
    return folder


def argv_of_rings(molecules: Path, path: Path) -> list[str]:
    argv = ["--data", str(molecules), "--sets", "RINGS", "--tuning-sets", "RINGS", "--tuning-folds", "1"]
    argv += ["--epochs", "1", "--steps", "1", "2", "--threads", "1", "--results", str(path)]
    return argv


def test_graph_classification_runs_resumes_and_says_what_its_rows_say(script, molecules, tmp_path, monkeypatch):
    benchmark = script("graph_classification")
    path = tmp_path / "rows.jsonl"
    argv = argv_of_rings(molecules, path)
    with pytest.raises(ValueError, match="Not all settings of ET"):
        benchmark.main([*argv, "--fit", "nothing"])
    text = benchmark.main(argv)
    rows = rows_of(path)
    assert path.with_suffix(".png").stat().st_size > 5_000 and "(rows.png)" in text
    for part in ("machine", "torch_geometric 2", "python benchmarks/graph_classification.py", "no target"):
        assert part in text
    fits = [row for row in rows if row["kind"] == "fit"]
    for model in ("ET", "GIN"):
        tried = [row for row in fits if row["model"] == model and row["fold"] == 1]
        assert len(tried) == len(benchmark.TRIES[model])
        best = max(tried, key=lambda row: row["validation"])
        folds = [row for row in fits if row["model"] == model and row["setting"] == best["setting"]]
        assert sorted(row["fold"] for row in folds) == list(range(1, 11))
        values = [100 * row["test"] for row in sorted(folds, key=lambda row: row["fold"])]
        cells = cells_of(text, "# Graph", "RINGS" if model == "ET" else "", model)
        assert cells[2] == f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"
    assert cells_of(text, "# Graph", "", "majority class")[2] == "50.0 ± 0.0"
    trained = [row for row in fits if row["model"] == "ET"]
    assert all(row["by_steps"][str(row["setting"]["T"])] == row["test"] for row in trained)

    monkeypatch.setattr(benchmark, "run_network", lambda *args: pytest.fail("measured again"))
    assert benchmark.main(argv) == text
    assert rows_of(path) == rows


def test_folds_are_disjoint_and_complete(script, molecules):
    data = script("graph_peers.graphs").GraphSet.load(molecules / "RINGS.npz")
    assert data.about() == {"graphs": 44, "classes": 2, "nodes": 176, "edges": 154, "features": 3, "in_no_fold": 4}
    tested = []
    for number in range(1, 11):
        fold = data.fold(number)
        names = [[id(graph) for graph in part] for part in (fold.train, fold.validation, fold.test)]
        assert [len(set(part)) for part in names] == [36, 4, 4]
        assert len(set().union(*names)) == 44
        tested += names[2]
    assert len(set(tested)) == 40


def test_the_best_weights_are_kept(script, molecules):
    peers = script("graph_peers.graphs")
    data = peers.GraphSet.load(molecules / "RINGS.npz")
    fold = data.fold(2)
    for model in ("ET", "GIN"):
        torch.manual_seed(0)
        network = peers.make_network(model, peers.TRIES[model][0], 3, 2)
        found = peers.fit(network, fold, 0.01, epochs=4, size=16, seed=0)
        assert found["validation"] == peers.judge(network, fold.validation, 16)[0]
        assert peers.judge(network, fold.test, 1)[0] == peers.judge(network, fold.test, 16)[0]
    assert peers.majority(fold) == 0.5
