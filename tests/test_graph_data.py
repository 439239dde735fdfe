"""Laws of graphs as data: batches and node order change nothing, positions are a graph's own, splits keep apart."""

import importlib
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from torch import nn
from transformers import EvalPrediction

from ebt_transformers import (
    EnergyTransformerConfig,
    EnergyTransformerForGraphClassification,
    EnergyTransformerForNodeClassification,
    GraphCollator,
)
from ebt_transformers.training import graph_positions
from ebt_transformers.training.graph_data import (
    Graph,
    Standardisation,
    add_positions,
    degree_features,
    laplacian_positions,
    load_anomaly,
    load_tu,
    merge_relations,
    node_splits,
    one_hot,
    undirected,
)
from ebt_transformers.training.thresholds import (
    THRESHOLDS,
    AnomalyMetrics,
    accuracy,
    auc,
    choose_threshold,
    macro_f1,
)


sys.path.append(str(Path(__file__).parent))  # the helper beside this file, under every import mode of pytest
from test_docstrings import test_examples_in_docstrings_run as run_examples  # noqa: E402


FEATURES, EDGE_FEATURES, POSITIONS = 3, 2, 4
SHAPE = {"hidden_size": 16, "num_attention_heads": 2, "num_node_features": FEATURES, "step_size": 0.5}


def graph_row(nodes: int, seed: int, **more: Any) -> dict[str, Any]:
    """A ring with random chords, features and a class; no two of its eigenvalues are equal."""
    draw = np.random.default_rng(seed)
    ring = np.stack([np.arange(nodes), (np.arange(nodes) + 1) % nodes])
    edges = undirected(np.concatenate([ring, draw.integers(0, nodes, (2, nodes // 2))], axis=1), nodes)
    features = draw.standard_normal((nodes, FEATURES)).astype(np.float32)
    return {"edge_index": edges, "num_nodes": nodes, "node_feat": features, "y": [seed % 2], **more}


def with_edge_features(row: dict[str, Any]) -> dict[str, Any]:
    """The same with features of edges, equal in both directions."""
    low, high = np.sort(row["edge_index"], axis=0)
    return {**row, "edge_attr": np.stack([np.sin(low + 2.0 * high), np.cos(low * high)], axis=1).astype(np.float32)}


def graph_model(**overrides: Any) -> EnergyTransformerForGraphClassification:
    options = {"num_labels": 2, "thinking_steps": 3, "num_blocks": 2, "initializer_range": 0.3}
    positions = {"position_embedding": "laplacian", "num_positions": POSITIONS}
    edges = {"edge_modulation": "pairwise", "num_edge_features": EDGE_FEATURES}
    torch.manual_seed(0)
    model = EnergyTransformerForGraphClassification(
        EnergyTransformerConfig(**{**SHAPE, **options, **positions, **edges, **overrides})
    ).eval()
    assert model.modulation is not None
    for layer in (model.modulation.pair, model.modulation.features):
        nn.init.normal_(layer.weight, std=0.3)  # edges weigh differently
    return model


def reordered(row: dict[str, Any], order: np.ndarray) -> dict[str, Any]:
    """The same graph with its nodes in another order, and its edges."""
    place = np.argsort(order)
    edges = np.random.default_rng(0).permutation(row["edge_index"].shape[1])
    moved = {name: row[name][order] for name in ("node_feat", "positions") if name in row}
    moved |= {name: row[name][edges] for name in ("edge_attr",) if name in row}
    return {**row, **moved, "edge_index": place[row["edge_index"]][:, edges]}


# ---- collator --------------------------------------------------------------------------------------------------


def test_the_order_of_nodes_and_edges_does_not_change_the_logits_of_a_graph() -> None:
    row = with_edge_features(graph_row(11, 1))
    row["positions"] = laplacian_positions(row["edge_index"], 11, POSITIONS)
    model, collate = graph_model(), GraphCollator()
    order = np.random.default_rng(3).permutation(11)
    with torch.no_grad():
        first, second = (model(**collate([each])).logits for each in (row, reordered(row, order)))
    assert (first - second).abs().max() < 1e-5
    moved = laplacian_positions(reordered(row, order)["edge_index"], 11, POSITIONS)
    assert np.abs(np.abs(moved) - np.abs(row["positions"][order])).max() < 1e-5


def test_a_batch_equals_its_graphs_alone_and_its_positions_do_too() -> None:
    rows = [with_edge_features(graph_row(nodes, nodes)) for nodes in (5, 9, 14, 3)]
    lonely = {"edge_index": [[], []], "num_nodes": 1, "node_feat": [[1.0, 2.0, 3.0]], "y": 0}
    rows.append({**lonely, "edge_attr": np.zeros((0, EDGE_FEATURES))})
    collate, model = GraphCollator(num_positions=POSITIONS), graph_model()
    batch = collate(rows)
    assert next(iter(batch)) == "labels" and batch["labels"].tolist() == [1, 1, 0, 1, 0]
    with torch.no_grad():
        together = model(**batch).logits
        alone = torch.cat([model(**collate([row])).logits for row in rows])
    assert (together - alone).abs().max() < 1e-5
    assert torch.equal(batch["positions"], torch.cat([collate([row])["positions"] for row in rows]))
    unsure = collate([rows[0], {**lonely, "edge_attr": []}])  # as tables keep it
    assert unsure["edge_features"].shape == (rows[0]["edge_index"].shape[1], EDGE_FEATURES)


def test_signs_of_positions_are_flipped_in_training_only() -> None:
    row = with_edge_features(graph_row(12, 5))
    row["positions"] = laplacian_positions(row["edge_index"], 12, POSITIONS)
    model, batch = graph_model(), GraphCollator()([row])
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, model(**batch).logits)
        model.train()
        drawn = {tuple(model(**batch).logits[0].tolist()) for _ in range(12)}
    assert len(drawn) > 1


def test_nodes_come_as_one_row_and_several_graphs_side_by_side() -> None:
    rows = [graph_row(nodes, nodes, y=[0, 1] * (nodes // 2)) for nodes in (6, 10)]
    rows[0]["edge_type"] = rows[0]["edge_index"].sum(0) % 2
    rows[1]["edge_type"] = rows[1]["edge_index"].sum(0) % 2
    torch.manual_seed(0)
    config = EnergyTransformerConfig(**SHAPE, num_labels=2, num_relations=2, thinking_steps=2, initializer_range=0.3)
    model, collate = EnergyTransformerForNodeClassification(config).eval(), GraphCollator("node")
    batch = collate(rows)
    assert {name: len(value) for name, value in batch.items()} == dict.fromkeys(batch, 1)
    assert next(iter(batch)) == "labels" and batch["labels"].shape == (1, 16)
    with torch.no_grad():
        together = model(**batch)
        alone = torch.cat([model(**collate([row])).logits for row in rows], dim=1)
    assert together.logits.shape == (1, 16, 2) and together.loss.isfinite()
    assert (together.logits - alone).abs().max() < 1e-5


def test_a_set_of_one_graph_is_collated_once() -> None:
    graph, collate = Graph.from_row(graph_row(8, 2, y=[0] * 8), "node"), GraphCollator("node", num_positions=2)
    first, second = collate([graph]), collate([graph])
    assert first is not second and all(first[name] is second[name] for name in first)
    other = collate([graph.with_labels([True] * 4 + [False] * 4)])
    assert other["labels"].tolist() == [[0] * 4 + [-100] * 4]


def test_tables_and_tensors_are_the_same_batch() -> None:
    rows = [with_edge_features(graph_row(nodes, nodes)) for nodes in (4, 7)]
    table = datasets.Dataset.from_list(
        [{name: np.asarray(value).tolist() for name, value in row.items()} for row in rows]
    )
    collate = GraphCollator()
    wanted = collate(rows)
    for given in ([table[0], table[1]], [Graph.from_row(row) for row in rows]):
        assert all(torch.equal(wanted[name], value) for name, value in collate(given).items())
    with_positions = collate(list(add_positions(table, 2)))["positions"]
    assert torch.equal(with_positions, GraphCollator(num_positions=2)(rows)["positions"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"node_feat": None}, "lacks node_feat"),
        ({"num_nodes": 5}, "5 nodes"),
        ({"edge_index": [[0], [9]]}, "0 to 3"),
        ({"edge_index": [[0, 1]]}, "(2, edges)"),
        ({"edge_index": [[0.5], [1.0]]}, "whole numbers"),
        ({"y": [0, 1]}, "class of the graph"),
        ({"y": 0.5}, "class of the graph"),
        ({"edge_attr": [[1.0]]}, "edge_attr"),
        ({"edge_type": [0]}, "edge_type"),
        ({"positions": [[1.0]]}, "positions"),
        ({"node_feat": [[1.0], [1.0, 2.0], [0.0], [0.0]]}, "same length"),
    ],
)
def test_rows_that_do_not_fit_together_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        GraphCollator()([{**graph_row(4, 0), **change}])


def test_batches_that_do_not_fit_together_are_refused() -> None:
    row = graph_row(4, 0)
    for other in ({"y": None}, {"node_feat": np.zeros((4, 1), np.float32)}, {"positions": np.zeros((4, 1))}):
        with pytest.raises(ValueError, match="graphs of a batch"):
            GraphCollator()([row, {**row, **other}])
    with pytest.raises(ValueError, match="`task` must be"):
        GraphCollator("edge")
    with pytest.raises(ValueError, match="at least 1"):
        GraphCollator(num_positions=0)
    with pytest.raises(ValueError, match="2 positions"):
        GraphCollator(num_positions=3)([{**row, "positions": np.zeros((4, 2))}])
    with pytest.raises(ValueError, match="at least one graph"):
        GraphCollator()([])


# ---- positions -------------------------------------------------------------------------------------------------


def test_positions_are_eigenvectors_of_the_laplacian(monkeypatch: pytest.MonkeyPatch) -> None:
    edges, nodes = graph_row(20, 7)["edge_index"], 20
    adjacency = np.zeros((nodes, nodes))
    adjacency[edges[0], edges[1]] = 1
    scale = adjacency.sum(0) ** -0.5
    laplacian = np.eye(nodes) - scale[:, None] * adjacency * scale
    values = np.linalg.eigvalsh(laplacian)[1:6]
    positions = laplacian_positions(edges, nodes, 5)
    assert np.abs(laplacian @ positions - positions * values).max() < 1e-5
    monkeypatch.setattr(graph_positions, "DENSE_NODES", 0)
    sparse = laplacian_positions(edges, nodes, 5)
    assert np.abs(np.abs(sparse) - np.abs(positions)).max() < 1e-5


def test_every_part_of_a_graph_has_its_own_positions() -> None:
    first, second = graph_row(6, 1)["edge_index"], graph_row(9, 2)["edge_index"]
    both = np.concatenate([first, second + 6], axis=1)
    found = laplacian_positions(both, 16, 7)  # the last node is alone
    assert np.abs(found[:6] - laplacian_positions(first, 6, 7)).max() < 1e-6
    assert np.abs(found[6:15] - laplacian_positions(second, 9, 7)).max() < 1e-6
    assert not found[15].any() and not found[:6, 5:].any()


# ---- files -----------------------------------------------------------------------------------------------------


def save_tu(path: Path, **more: Any) -> Path:
    """Three graphs of 2, 3 and 1 nodes in one file."""
    values = {
        "y": np.array([1, 0, 1], np.int8),
        "graph_id": np.array([0, 0, 1, 1, 1, 2]),
        "node_label": np.array([0, 1, 2, 0, 1, 0]),
        "edge_index": np.array([[2, 3, 0, 1, 3, 4], [3, 2, 1, 0, 4, 3]]),
        "edge_label": np.array([1, 1, 0, 0, 1, 1]),
        "test_fold": np.array([1, 2, -1]),
    }
    np.savez(path, **{**values, **more})
    return path


def test_sets_of_graphs_are_read(tmp_path: Path) -> None:
    table, folds = load_tu(save_tu(tmp_path / "set.npz"))
    assert folds is not None and folds.tolist() == [1, 2, -1]
    assert table["num_nodes"] == [2, 3, 1] and table["y"] == [1, 0, 1]
    assert table[1]["edge_index"] == [[0, 1, 1, 2], [1, 0, 2, 1]] and table[2]["edge_index"] == [[], []]
    assert table[1]["node_feat"] == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
    assert table[0]["edge_attr"] == [[1, 0], [1, 0]]
    assert GraphCollator()(list(table))["edge_features"].shape == (6, 2)
    same, _ = load_tu(save_tu(tmp_path / "same.npz", node_label=np.zeros(6, int)))
    assert np.array(same[1]["node_feat"]).argmax(1).tolist() == [1, 2, 1]  # the number of edges
    with pytest.raises(ValueError, match="different graphs"):
        load_tu(save_tu(tmp_path / "wrong.npz", edge_index=np.array([[0], [2]]), edge_label=np.array([0])))
    with pytest.raises(ValueError, match="ascend"):
        load_tu(save_tu(tmp_path / "order.npz", graph_id=np.array([0, 1, 0, 1, 1, 2])))


def test_one_graph_is_read_whatever_its_parts_are_called(tmp_path: Path) -> None:
    edges, features, labels = np.array([[0, 1, 1], [1, 2, 1]]), np.eye(3, dtype=np.float32), np.array([0, 1, 0])
    np.savez(tmp_path / "a.npz", x=features, y=labels, edge_index=edges)
    np.savez(tmp_path / "b.npz", node_features=features, node_labels=labels, edges=edges.T)
    np.savez(tmp_path / "c.npz", prior=features, y=labels, edge_index_uses=edges, edge_index_buys=edges[:, :1])
    a, b, c = (load_anomaly(tmp_path / f"{name}.npz") for name in "abc")
    assert a["edge_index"].tolist() == [[0, 1, 1, 2], [1, 0, 2, 1]] == b["edge_index"].tolist()
    assert a["y"].tolist() == [0, 1, 0] == b["y"].tolist() and "edge_type" not in a
    assert c["relations"] == ["buys", "uses"] and c["edge_type"].tolist() == [0, 0, 1, 1, 1, 1]
    merged = merge_relations(c)
    assert merged["edge_index"].tolist() == a["edge_index"].tolist() and "edge_type" not in merged
    np.savez(tmp_path / "d.npz", x=features, y=labels)
    with pytest.raises(ValueError, match="none of the keys edge_index, edges"):
        load_anomaly(tmp_path / "d.npz")
    with pytest.raises(FileNotFoundError, match="no file"):
        load_anomaly(tmp_path / "e.npz")
    (tmp_path / "f.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="no npz file"):
        load_anomaly(tmp_path / "f.npz")


def test_helpers_check_what_they_get() -> None:
    assert undirected([[0, 1, 0], [1, 0, 0]], 3, self_loops=True).tolist() == [[0, 0, 1, 1, 2], [0, 1, 0, 1, 2]]
    assert undirected(np.zeros((2, 0), int), 3).shape == (2, 0)
    assert degree_features([[0] * 70, [1] * 70], 2).argmax(1).tolist() == [0, 63]
    with pytest.raises(ValueError, match="0 to 1"):
        one_hot([0, 2], 2)
    with pytest.raises(ValueError, match="whole numbers"):
        one_hot([0.5])


def test_self_loops_are_added_once_for_every_relation() -> None:
    row = {**graph_row(3, 0), "edge_index": [[0, 1, 2], [1, 0, 2]], "edge_type": [0, 1, 0], "edge_attr": [[1.0]] * 3}
    looped = Graph.from_row(row).with_self_loops()
    assert looped.edge_index.tolist() == [[0, 1, 0, 1, 2, 0, 1, 2], [1, 0, 0, 1, 2, 0, 1, 2]]
    assert looped.edge_type is not None and looped.edge_type.tolist() == [0, 1, 0, 0, 0, 1, 1, 1]
    assert looped.edge_features is not None and looped.edge_features[:, 0].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]


# ---- splits, features, thresholds ------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.05, 0.4])
def test_splits_are_disjoint_stratified_and_differ_by_seed(share: float) -> None:
    labels = np.array([0] * 900 + [1] * 100 + [-100] * 50)
    masks = np.stack(node_splits(labels, share, seed=1))
    assert (masks.sum(0) == (labels != -100)).all()
    train, validation, test = (labels[mask] for mask in masks)
    assert len(train) == round(1000 * share) and abs(len(validation) / len(test) - 33 / 67) < 0.01
    for part in (train, validation, test):
        assert abs((part == 1).mean() - 0.1) < 0.01
    assert (masks == np.stack(node_splits(labels, share, seed=1))).all()
    assert (masks[0] != node_splits(labels, share, seed=2)[0]).any()


def test_splits_that_would_lack_a_class_are_refused() -> None:
    with pytest.raises(ValueError, match="None of the nodes to train has class 1"):
        node_splits([0] * 500 + [1] * 5, 0.01, seed=0)
    with pytest.raises(ValueError, match="above 0 and below 1"):
        node_splits([0, 1], 1.0, seed=0)


def test_standardised_features_can_become_a_part_of_the_weights() -> None:
    features = torch.randn(50, 4) * torch.tensor([1.0, 300.0, 0.01, 1.0]) + torch.tensor([0.0, 1000.0, 5.0, 0.0])
    features[:, 0], features[:, 3] = (features[:, 0] > 0).float(), 7.0
    scaling = Standardisation.of(features)
    applied = scaling.apply(features)
    assert torch.equal(applied[:, 0], features[:, 0])
    elsewhere = scaling.apply(torch.full((1, 4), 1e5))[0, 3]  # where a column that never changed does change
    assert applied[:, 3].abs().max() == 0 and elsewhere.abs() < 1e-6
    assert applied[:, 1:3].mean(0).abs().max() < 1e-3 and (applied[:, 1:3].std(0, correction=0) - 1).abs().max() < 1e-3
    layer, before = nn.Linear(4, 3), nn.Linear(4, 3)
    before.load_state_dict(layer.state_dict())
    scaling.build_into(layer)
    assert (layer(features) - before(applied)).abs().max() < 1e-3
    scaling.take_out_of(layer)
    assert (layer.weight - before.weight).abs().max() < 1e-5 and (layer.bias - before.bias).abs().max() < 1e-3


def test_macro_f1_is_that_of_scikit_learn_and_the_threshold_is_the_best() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        labels = (draw.random(40) < 0.3).astype(int)
        scores = np.clip(draw.random(40) * 0.7 + 0.3 * labels, 0, 1)
        each = {value: f1_score(labels, scores > value, average="macro", zero_division=0) for value in THRESHOLDS}
        assert all(abs(macro_f1(labels, scores, value) - wanted) < 1e-12 for value, wanted in each.items())
        assert each[choose_threshold(labels, scores)] == max(each.values())


def test_a_given_threshold_does_not_depend_on_the_labels_it_is_tested_with() -> None:
    logits, labels = np.random.default_rng(0).standard_normal((1, 60, 2)), np.array([[0, 1, -100] * 20])
    for given in (labels, 1 - np.abs(labels), np.roll(labels, 1)):
        assert AnomalyMetrics(0.35)(EvalPrediction(logits, np.where(given < 0, -100, given)))["threshold"] == 0.35
    assert AnomalyMetrics()(EvalPrediction(logits, labels))["threshold"] in THRESHOLDS
    assert accuracy(EvalPrediction(logits[0], labels[0] * 0)) == {"accuracy": (logits[0].argmax(1) == 0).mean()}
    with pytest.raises(ValueError, match="anomalies and other nodes"):
        auc([0, 0], [0.1, 0.2])


@pytest.mark.parametrize("name", ["graph_data", "graph_loading", "graph_positions", "thresholds", "arguments_et"])
def test_examples_of_the_documentation_run(name: str) -> None:
    importlib.import_module(f"ebt_transformers.training.{name}")
    run_examples(f"ebt_transformers.training.{name}")
