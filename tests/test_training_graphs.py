"""Laws of training on graphs: small batches and interruptions change nothing, test labels stay unseen."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from ebt_transformers import (
    EBTTrainer,
    EnergyTransformerConfig,
    EnergyTransformerForGraphClassification,
    EnergyTransformerTrainingArguments,
    GraphCollator,
    cli,
)
from ebt_transformers.training import run_anomaly
from ebt_transformers.training.arguments_et import AnomalyTrainingArguments, GraphTrainingArguments
from ebt_transformers.training.graph_data import Graph, load_anomaly, node_splits, undirected
from ebt_transformers.training.thresholds import AnomalyMetrics


sys.path.append(str(Path(__file__).parent))  # the helper beside this file, under every import mode of pytest
from interruption import StopAt  # noqa: E402


QUIET = ["--report_to", "none", "--disable_tqdm", "true"]
TINY = ["--hidden_size", "16", "--num_attention_heads", "2", "--num_memories", "16"]


def ring(nodes: int, chord: bool) -> np.ndarray:
    """A ring, with a shortcut through it or without."""
    edges = np.stack([np.arange(nodes), (np.arange(nodes) + 1) % nodes])
    return undirected(np.concatenate([edges, [[0], [nodes // 2]]], axis=1) if chord else edges, nodes)


def graph_rows(count: int) -> list[dict[str, Any]]:
    """Rings whose class is whether they have a shortcut."""
    draw = np.random.default_rng(count)
    rows = []
    for index in range(count):
        nodes = int(draw.integers(6, 10))
        edges = ring(nodes, index % 2 == 1)
        features = np.stack([np.bincount(edges[0], minlength=nodes), draw.standard_normal(nodes)], axis=1)
        row = {"edge_index": edges, "num_nodes": nodes, "node_feat": features.astype(np.float32), "y": [index % 2]}
        rows.append(row)
    return rows


def save_table(path: Path, rows: list[dict[str, Any]]) -> str:
    plain = [{name: np.asarray(value).tolist() for name, value in row.items()} for row in rows]
    datasets.Dataset.from_list(plain).to_parquet(str(path))
    return str(path)


def save_fraud(path: Path, nodes: int = 300) -> str:
    """A graph whose anomalies have other features, on a scale of their own, and two kinds of edges."""
    draw = np.random.default_rng(5)
    labels = (np.arange(nodes) % 5 == 0).astype(np.int8)
    features = draw.standard_normal((nodes, 3)).astype(np.float32) * [50.0, 1.0, 0.01] + [100.0, 0.0, 0.0]
    features[:, 1] += 2.5 * labels
    edges = {f"edge_index_{name}": draw.integers(0, nodes, (2, 2 * nodes)) for name in ("a", "b")}
    np.savez(path, x=features.astype(np.float32), y=labels, **edges)
    return str(path)


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in model.state_dict().values()])


def tiny_model() -> EnergyTransformerForGraphClassification:
    torch.manual_seed(0)
    config = EnergyTransformerConfig(
        hidden_size=16, num_attention_heads=2, num_node_features=2, num_labels=2, initializer_range=0.3
    )
    return EnergyTransformerForGraphClassification(config)


# ---- trainer ---------------------------------------------------------------------------------------------------


def test_small_batches_accumulated_are_one_large_batch(tmp_path: Path) -> None:
    graphs = [Graph.from_row(row) for row in graph_rows(8)]
    found = []
    for size, count in ((8, 1), (2, 4)):
        args = GraphTrainingArguments(
            output_dir=str(tmp_path / str(size)), per_device_train_batch_size=size, gradient_accumulation_steps=count,
            max_steps=3, eval_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True, optim="sgd",
            learning_rate=0.1,
        )  # fmt: skip
        trainer = EBTTrainer(tiny_model(), args, train_dataset=graphs, data_collator=GraphCollator())
        trainer.train()
        found.append(weights(trainer.model))
    moved = (found[0] - weights(tiny_model())).abs().max()
    assert moved > 1e-2 and (found[0] - found[1]).abs().max() < 1e-3 * moved


def test_a_run_that_was_interrupted_ends_as_one_that_was_not(tmp_path: Path) -> None:
    graphs = [Graph.from_row(row).with_positions(3) for row in graph_rows(10)]
    options = {"position_embedding": "laplacian", "num_positions": 3, "noise_std": 0.02, "num_labels": 2}

    def make(name: str, callbacks: list[Any]) -> EBTTrainer:
        torch.manual_seed(0)
        shape = {"hidden_size": 16, "num_attention_heads": 2, "num_node_features": 2, "thinking_steps": 2}
        model = EnergyTransformerForGraphClassification(EnergyTransformerConfig(**shape, **options))
        args = GraphTrainingArguments(
            output_dir=str(tmp_path / name), per_device_train_batch_size=4, max_steps=7, eval_strategy="no",
            save_strategy="steps", save_steps=4, report_to=[], disable_tqdm=True,
        )  # fmt: skip
        return EBTTrainer(model, args, train_dataset=graphs, data_collator=GraphCollator(), callbacks=callbacks)

    whole = make("whole", [])
    whole.train()
    make("parts", [StopAt(4)]).train()
    resumed = make("parts", [])
    resumed.train(resume_from_checkpoint="auto")
    assert resumed.state.global_step == 7
    assert torch.equal(weights(whole.model), weights(resumed.model))


def test_arguments_have_the_defaults_of_the_paper_and_refuse_what_would_be_ignored(tmp_path: Path) -> None:
    folder = str(tmp_path)
    images = EnergyTransformerTrainingArguments(output_dir=folder)
    assert (images.learning_rate, images.adam_beta2, images.weight_decay) == (5e-4, 0.99, 0.05)
    assert (images.max_grad_norm, images.lr_scheduler_type, images.remove_unused_columns) == (1.0, "cosine", False)
    graphs = GraphTrainingArguments(output_dir=folder, eval_strategy="steps", eval_steps=7)
    assert (graphs.learning_rate, graphs.save_steps, graphs.load_best_model_at_end) == (1e-3, 7, True)
    assert not GraphTrainingArguments(output_dir=folder, eval_strategy="no").load_best_model_at_end
    assert AnomalyTrainingArguments(output_dir=folder).metric_for_best_model == "macro_f1"
    with pytest.raises(ValueError, match="label_smoothing"):
        EnergyTransformerTrainingArguments(output_dir=folder, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="whole graph"):
        AnomalyTrainingArguments(output_dir=folder, per_device_train_batch_size=2)
    with pytest.raises(ValueError, match="early_stopping_patience"):
        EnergyTransformerTrainingArguments(output_dir=folder, early_stopping_patience=2)


# ---- ebt train graph -------------------------------------------------------------------------------------------


def test_graphs_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train, test = save_table(tmp_path / "a.parquet", graph_rows(20)), save_table(tmp_path / "b.parquet", graph_rows(6))
    folder = tmp_path / "run"
    command = [
        "train",
        "graph",
        "--output_dir",
        str(folder),
        "--train_file",
        train,
        "--test_file",
        test,
        *TINY,
        *QUIET,
    ]
    command += ["--num_train_epochs", "3", "--num_positions", "2", "--eval_thinking_steps", "1", "3"]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "10 % of the training graphs are held out" in said and "| thinking steps |" in said
    results = json.loads((folder / "all_results.json").read_text())
    assert {"eval_accuracy", "test_accuracy", "test_loss"} <= set(results)
    thinking = json.loads((folder / "thinking_results.json").read_text())
    assert [row["thinking_steps"] for row in thinking["rows"]] == [1, 3]
    assert thinking["rows"][0]["test_loss"] != thinking["rows"][1]["test_loss"]

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.thinking_steps == 2
    with torch.no_grad():  # the saved model takes features as they are
        loss = model(**GraphCollator(num_positions=2)(graph_rows(6))).loss
    assert abs(float(loss) - results["test_loss"]) < 1e-4
    card = ModelCard.load(folder / "README.md")
    assert (card.data.pipeline_tag, card.data.library_name) == ("graph-ml", "transformers")
    assert "energy-transformer" in card.data.tags
    measured = {(result.dataset_split, result.metric_type) for result in card.data.eval_results}
    assert measured == {("validation", "accuracy"), ("test", "accuracy")}
    assert "hoover2023energy" in card.text and "perplexity" not in card.text and "image_size" not in card.text
    code = card.text.split("```python\n")[1].split("```")[0].replace('"run"', repr(str(folder)))
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["probabilities"].shape == (1, 2)

    assert cli.main(command) == 0
    assert "nothing to train" in capsys.readouterr().out
    assert json.loads((folder / "all_results.json").read_text())["test_loss"] == results["test_loss"]
    assert cli.main([*command[:-3], "--num_train_epochs", "4"]) == 0  # a run that shall be longer goes on
    assert "going on from there" in capsys.readouterr().out


def test_folds_test_what_never_trains_and_edges_with_features_weigh(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = graph_rows(30)
    starts = np.cumsum([0, *(row["num_nodes"] for row in rows)])
    edges = np.concatenate([row["edge_index"] + start for row, start in zip(rows, starts, strict=False)], axis=1)
    path = tmp_path / "set.npz"
    np.savez(
        path, y=np.array([row["y"][0] for row in rows]), test_fold=np.arange(30) // 2 % 3 + 1, edge_index=edges,
        graph_id=np.repeat(np.arange(30), [row["num_nodes"] for row in rows]), node_label=np.zeros(starts[-1], int),
        edge_label=edges.sum(0) % 2,
    )  # fmt: skip
    folder = tmp_path / "run"
    command = ["train", "graph", "--output_dir", str(folder), "--train_file", str(path), *TINY, *QUIET]
    command += ["--max_steps", "1", "--eval_strategy", "no"]
    assert cli.main([*command, "--test_fold", "2"]) == 0
    assert "train: 18 graphs, test: 10 graphs, validation: 2 graphs" in capsys.readouterr().out
    config = json.loads((folder / "config.json").read_text())
    assert (config["edge_modulation"], config["num_edge_features"], config["num_positions"]) == ("pairwise", 2, 15)
    command[3] = str(tmp_path / "other")
    assert cli.main([*command, "--test_fold", "4"]) == 2
    assert "--test_fold must be one of 1, 2, 3, got 4" in capsys.readouterr().err


def test_a_saved_model_is_trained_further_from_where_it_was(tmp_path: Path) -> None:
    train = save_table(tmp_path / "a.parquet", graph_rows(12))
    rest = ["--train_file", train, "--validation_split_percentage", "0", "--eval_strategy", "no", *QUIET]
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    start = ["train", "graph", "--output_dir", first, *rest, *TINY, "--num_positions", "2", "--max_steps", "2"]
    assert cli.main(start) == 0
    further = ["train", "graph", "--output_dir", second, *rest, "--model_name_or_path", first]
    assert cli.main([*further, "--max_steps", "1", "--learning_rate", "0"]) == 0
    models = [AutoModelForSequenceClassification.from_pretrained(folder) for folder in (first, second)]
    assert (weights(models[0]) - weights(models[1])).abs().max() < 1e-5


# ---- ebt train anomaly -----------------------------------------------------------------------------------------


def test_anomalies_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    graph, folder = save_fraud(tmp_path / "fraud.npz"), tmp_path / "run"
    command = ["train", "anomaly", "--output_dir", str(folder), "--train_file", graph, *TINY, *QUIET]
    command += ["--relations", "separate", "--num_train_epochs", "20", "--learning_rate", "0.02"]
    command += ["--eval_thinking_steps", "1", "2", "--eval_strategy", "steps", "--eval_steps", "10"]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "120 nodes (24 anomalies) train, 59 validate, 121 test" in said
    results = json.loads((folder / "test_results.json").read_text())
    assert {"test_macro_f1", "test_auc", "test_threshold"} <= set(results) and results["test_auc"] > 0.8
    assert results["test_threshold"] == json.loads((folder / "eval_results.json").read_text())["eval_threshold"]

    model = AutoModelForTokenClassification.from_pretrained(folder)
    assert (model.config.num_relations, model.config.class_weights) == (2, [1.0, 96 / 24])
    row = load_anomaly(graph)
    test = node_splits(row["y"], 0.4, 0)[2]
    with torch.no_grad():  # the saved model takes features as they are
        logits = model(**GraphCollator("node")([row])).logits.numpy()
    labels = np.where(test, row["y"], -100)[None]
    found = AnomalyMetrics(results["test_threshold"])(type("Found", (), {"predictions": logits, "label_ids": labels}))
    assert abs(found["auc"] - results["test_auc"]) < 1e-3
    assert abs(found["macro_f1"] - results["test_macro_f1"]) < 0.02
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "graph-ml" and "node-classification" in card.data.tags
    assert f"above {results['test_threshold']}" in card.text
    assert cli.main(command) == 0
    assert "nothing to train" in capsys.readouterr().out


def test_test_labels_choose_neither_threshold_nor_weights(tmp_path: Path) -> None:
    path = tmp_path / "fraud.npz"
    save_fraud(path)
    with np.load(path) as file:
        values = dict(file)
    test = node_splits(values["y"], 0.4, 0)[2]
    told = []
    for name, change in (("as they are", False), ("exchanged", True)):
        labels = values["y"].copy()
        if change:  # another anomaly for every one of the test nodes, so that the split stays the same
            labels[np.flatnonzero(test)] = labels[np.flatnonzero(test)][::-1]
        folder = tmp_path / name
        run = _trained_anomaly(values, labels, test, folder)
        told.append(run)
    assert told[0]["weights"].equal(told[1]["weights"]) and told[0]["threshold"] == told[1]["threshold"]
    assert told[0]["auc"] != told[1]["auc"]


def _trained_anomaly(values: dict[str, Any], labels: np.ndarray, test: np.ndarray, folder: Path) -> dict[str, Any]:
    """What the script does, with a fixed split and other labels of test nodes."""
    path = folder.with_suffix(".npz")
    np.savez(path, **{**values, "y": labels})
    masks = node_splits(values["y"], 0.4, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ebt_transformers.training.graph_data.node_splits", lambda *_: masks)
        run_anomaly.main(
            ["--output_dir", str(folder), "--train_file", str(path), *TINY, *QUIET, "--num_train_epochs", "4"]
            + ["--learning_rate", "0.02", "--eval_strategy", "steps", "--eval_steps", "2"]
        )
    results = json.loads((folder / "test_results.json").read_text())
    model = AutoModelForTokenClassification.from_pretrained(folder)
    return {"weights": weights(model), "threshold": results["test_threshold"], "auc": results["test_auc"]}


# ---- mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("graph", [], "Say which graphs to train on"),
        ("graph", ["--train_file", "none.npz"], "There is no file none.npz"),
        ("graph", ["--train_file", "none.parquet"], "does not exist"),
        ("graph", ["--train_file", "x.npz", "--test_file", "y.parquet"], "x.npz is read alone"),
        ("graph", ["--dataset_name", "a/b", "--train_file", "x.npz"], "both name the data"),
        ("graph", ["--train_file", "x.parquet", "--test_split", "b"], "needs --dataset_name"),
        ("graph", ["--train_file", "x.npz", "--hidden_sise", "3"], "hidden_sise"),
        ("graph", ["--train_file", "x.npz", "--eval_thinking_steps", "0"], "at least 1, got 0"),
        ("graph", ["--train_file", "x.npz", "--trust_remote_code"], "with --model_name_or_path only"),
        ("anomaly", ["--train_file", "FRAUD", "--train_share", "1.5"], "above 0 and below 1, got 1.5"),
        ("anomaly", ["--train_file", "FRAUD", "--relations", "both"], "merged, separate, got 'both'"),
        ("anomaly", ["--train_file", "FRAUD", "--config_overrides", "num_labels=2"], "no field=value"),
        ("anomaly", ["--train_file", "FRAUD", "--config_overrides", "num_relations=2"], "follows from the data"),
        ("anomaly", ["--train_file", "FRAUD", "--num_attention_heads", "0"], "at least 1"),
        ("anomaly", ["--train_file", "FRAUD", "--train_share", "0.001"], "cannot be split"),
        ("anomaly", ["--train_file", "TABLE"], "must have one"),
    ],
)
def test_mistakes_are_told_in_one_line(
    kind: str, more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    if "FRAUD" in more:
        more = [save_fraud(tmp_path / "fraud.npz") if word == "FRAUD" else word for word in more]
    if "TABLE" in more:
        more = [save_table(tmp_path / "t.parquet", graph_rows(2)) if word == "TABLE" else word for word in more]
    assert cli.main(["train", kind, "--output_dir", str(tmp_path / "run"), *more]) == 2
    said = capsys.readouterr().err
    told = [line for line in said.splitlines() if line.strip() and "?" not in line and "/s]" not in line]  # no bars
    assert len(told) == 1 and told[0].startswith("ebt train") and message in told[0]


@pytest.mark.parametrize("kind", ["anomaly", "graph"])
def test_help_names_the_options_there_are(kind: str, subprocess_env: dict[str, str]) -> None:
    code = (
        f"import sys\nfrom ebt_transformers.cli import main\ntry:\n    main(['train', {kind!r}, '--help'])\n"
        "finally:\n    assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=subprocess_env)
    assert done.returncode == 0, done.stderr
    assert "--eval_thinking_steps" in done.stdout and "--recipe" not in done.stdout
