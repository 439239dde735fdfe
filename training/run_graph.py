r"""
Train an Energy Transformer that classifies graphs, such as molecules.

    ebt train graph --output_dir runs/proteins --train_file PROTEINS.npz --test_fold 1
    ebt train graph --output_dir runs/mine --train_file train.parquet --validation_file valid.parquet \
        --test_file test.parquet
    ebt train graph --output_dir runs/hub --dataset_name graphs-datasets/MUTAG

Graphs are an .npz file with many of them, which may say in which fold each is tested, or the rows of tables with the
usual columns: `edge_index`, `node_feat`, `y`, and where there are such `edge_attr`. Nodes without features are
described by the number of their edges.

A new model has 2 blocks of 2 thinking steps, width 64, 4 heads, 4 times as many memories as the width, 15 Laplacian
eigenvectors and label smoothing 0.05. The paper's has 4 blocks, width 128, 12 heads of 64 (config_overrides:
head_dim=64), 512 memories, noise 0.02, and 300 epochs in batches of 64.

The same command started again goes on from its last checkpoint. At the end the model is evaluated on the validation
and test data there is (`all_results.json`), and saved with its model card. `--eval_thinking_steps 1 2 4 8` also
evaluates it with other numbers of steps.
"""

import shlex
import sys
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .graph_script import (
    TRAINING_OPTIONS,
    GraphModelArguments,
    GraphRunArguments,
    archive_of,
    check_graph_options,
    compare_thinking,
    evaluate,
    graph_config,
    graph_tables,
    load_graph_model,
    save_graph_model,
)
from .script import (
    Refusal,
    RunArguments,
    check_counts,
    check_same_model,
    conclude,
    fit,
    parse_command_line,
    plan_phases,
    refusing_bad_values,
    say,
    say_size,
    start_point,
)


if TYPE_CHECKING:
    from .arguments_et import GraphTrainingArguments
    from .graph_data import Graph
    from .trainer import EBTTrainer

DEFAULTS = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "memories": 4,
    "num_blocks": 2,
    "thinking_steps": 2,
    "initializer_range": 0.1,
    "label_smoothing": 0.05,
    "position_embedding": "laplacian",
}
DEFAULT_VALIDATION_PERCENT = 10.0


@dataclass
class GraphDataArguments:
    """Which graphs, and which of them validate and test."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "A Hub id, a local folder or file with tables of graphs."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    train_file: list[str] | None = field(
        default=None, metadata={"help": "Training graphs: one .npz file, or .parquet or .jsonl files."}
    )
    validation_file: list[str] | None = field(default=None, metadata={"help": "Validation graphs."})
    test_file: list[str] | None = field(default=None, metadata={"help": "Test graphs."})
    train_split: str | None = field(
        default=None,
        metadata={"help": "Split of --dataset_name to train on, or a part: train[:90%%]. Default: train."},
    )
    validation_split: str | None = field(
        default=None, metadata={"help": "Split to validate with. Default: validation, valid, val or dev."}
    )
    test_split: str | None = field(default=None, metadata={"help": "Split to test with. Default: test."})
    test_fold: int | None = field(
        default=None, metadata={"help": "Fold of an .npz file to test on; the others train and validate."}
    )
    validation_split_percentage: float | None = field(
        default=None,
        metadata={
            "help": "Random share of every class of the training graphs held out when there is no validation data. "
            f"Default: {DEFAULT_VALIDATION_PERCENT:g}; 0 for none."
        },
    )
    split_seed: int = field(default=0, metadata={"help": "Which graphs these are: another seed, another split."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many graphs."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first so many graphs."})


def _training_class() -> "type[GraphTrainingArguments]":
    from .arguments_et import GraphTrainingArguments

    return GraphTrainingArguments


# ---- graphs ----------------------------------------------------------------------------------------------------


def _load_graphs(data: GraphDataArguments) -> dict[str, list["Graph"]]:
    """The graphs of each split, some of them held out for validation unless there shall be none."""
    import numpy as np

    from .graph_data import Graph, load_tu

    archive = archive_of(data)
    if archive is None:
        if data.test_fold is not None:
            raise Refusal("--test_fold has an effect with an .npz file only; of tables give --test_file.")
        tables = {
            split: _with_features(split, [_checked(row) for row in rows]) for split, rows in graph_tables(data).items()
        }
        graphs = {split: [Graph.from_row(row) for row in rows] for split, rows in tables.items()}
    else:
        rows, folds = load_tu(archive)
        everything = [Graph.from_row(row) for row in rows]
        tests = np.zeros(len(everything), dtype=bool)
        if data.test_fold is not None:
            if folds is None:
                raise Refusal(f"--test_fold: {archive} has no folds (`test_fold`).")
            tests = folds == data.test_fold
            if data.test_fold < 1 or not tests.any():
                known = ", ".join(str(fold) for fold in sorted(set(folds.tolist())) if fold > 0)
                raise Refusal(f"--test_fold must be one of {known}, got {data.test_fold}.")
        graphs = {"train": [graph for graph, test in zip(everything, tests, strict=True) if not test]}
        if tests.any():
            graphs["test"] = [graph for graph, test in zip(everything, tests, strict=True) if test]
    if any(graph.label is None for split in graphs.values() for graph in split):
        raise Refusal("Some graphs have no class (`y`).")
    _hold_out(graphs, data)
    for split, limit in (
        ("train", data.max_train_samples),
        ("validation", data.max_eval_samples),
        ("test", data.max_eval_samples),
    ):
        if split in graphs:
            graphs[split] = graphs[split][:limit]
    return graphs


def _checked(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose kinds of edges would be left out is refused."""
    if row.get("edge_type") is not None:
        raise Refusal("Kinds of edges (`edge_type`) are features here: give them as `edge_attr`, one-hot.")
    return row


def _with_features(split: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Describes nodes without features by the number of their edges."""
    from .graph_data import degree_features

    if all(row.get("node_feat") is not None for row in rows):
        return rows
    if any(row.get("node_feat") is not None or row.get("num_nodes") is None for row in rows):
        raise Refusal(f"Some {split} graphs have neither `node_feat` nor `num_nodes`, or only some have `node_feat`.")
    say(f"{split}: the nodes have no features (`node_feat`); the number of their edges describes them.")
    return [{**row, "node_feat": degree_features(row["edge_index"], int(row["num_nodes"]))} for row in rows]


def _hold_out(graphs: dict[str, list["Graph"]], data: GraphDataArguments) -> None:
    """Takes validation graphs from those for training, where there are none; changes `graphs`."""
    percent = data.validation_split_percentage
    if "validation" in graphs:
        if percent is not None:
            raise Refusal(
                "--validation_split_percentage has no effect: there is validation data already. Leave it out."
            )
        return
    percent = DEFAULT_VALIDATION_PERCENT if percent is None else percent
    if percent == 0:
        return
    if not 0 < percent < 100:
        raise Refusal(f"--validation_split_percentage must be at least 0 and below 100, got {percent}.")
    try:
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise Refusal(
            "Holding graphs out needs scikit-learn: pip install 'ebt-transformers[evaluate]'. Or give validation data."
        ) from error
    labels = [int(graph.label) for graph in graphs["train"] if graph.label is not None]
    say(f"No validation data: {percent:g} % of the training graphs are held out for it.")
    graphs["train"], graphs["validation"] = train_test_split(
        graphs["train"], stratify=labels, test_size=percent / 100, random_state=data.split_seed
    )


def _prepare(graphs: dict[str, list["Graph"]], config: Any, scaling: Any) -> dict[str, list["Graph"]]:
    """The graphs as the model takes them."""
    import torch

    positions = config.num_positions if config.position_embedding == "laplacian" else None

    def prepared(graph: "Graph") -> "Graph":
        if scaling is not None:
            graph = replace(graph, node_features=scaling.apply(graph.node_features))
        if not config.num_edge_features:
            graph = replace(graph, edge_features=None)
        elif graph.edge_index.shape[1] == 0:
            graph = replace(graph, edge_features=torch.zeros(0, config.num_edge_features))
        if config.self_attention:
            graph = graph.with_self_loops()
        return replace(graph, positions=None) if positions is None else graph.with_positions(positions)

    return {split: [prepared(graph) for graph in each] for split, each in graphs.items()}


# ---- run -------------------------------------------------------------------------------------------------------


def _run(argv: list[str]) -> None:
    own = (GraphModelArguments, GraphDataArguments, GraphRunArguments, RunArguments)
    parsed = parse_command_line(argv, "graph", __doc__, own, _training_class, TRAINING_OPTIONS)
    model_args, data_args, graph_args, run_args, training_args = parsed
    check_graph_options(model_args, data_args, graph_args)
    check_counts(data_args, "max_train_samples", "max_eval_samples")
    import torch
    from transformers import AutoModelForSequenceClassification, set_seed

    from .graph_data import GraphCollator, Standardisation
    from .model_card import RunFacts
    from .thresholds import accuracy
    from .trainer import EBTTrainer

    checkpoint = start_point(training_args, run_args.overwrite)
    train, validate, test, checkpoint = plan_phases(argv, training_args, checkpoint)
    set_seed(training_args.seed)
    with training_args.main_process_first(desc="reading the graphs"), refusing_bad_values():
        graphs = _load_graphs(data_args)
        if training_args.eval_strategy != "no" and "validation" not in graphs:
            raise Refusal("--eval_strategy needs validation data; without any give --eval_strategy no.")
        # a graph without edges does not tell how many numbers an edge has
        edge_features = max(
            0 if graph.edge_features is None else graph.edge_features.shape[1] for graph in graphs["train"]
        )
        of_data = {
            "num_node_features": graphs["train"][0].node_features.shape[1],
            "num_labels": 1 + max(int(graph.label) for split in graphs.values() for graph in split),  # type: ignore[arg-type]
        }
        if model_args.model_name_or_path is None:
            config = graph_config(model_args, DEFAULTS, of_data, edge_features)
            model = AutoModelForSequenceClassification.from_config(config)
        else:
            model = load_graph_model(model_args, AutoModelForSequenceClassification, of_data)
            config = model.config
        scaling = None
        if graph_args.standardise:
            scaling = Standardisation.of(torch.cat([graph.node_features for graph in graphs["train"]]))
            if model_args.model_name_or_path is not None:
                scaling.take_out_of(model.nodes.features)
        graphs = _prepare(graphs, config, scaling)
    say(", ".join(f"{split}: {len(each):,} graphs" for split, each in graphs.items()) + ".")
    source = data_args.dataset_name or " ".join(data_args.train_file or [])
    fold = "" if data_args.test_fold is None else f", without fold {data_args.test_fold}, which tests"
    with refusing_bad_values():
        trainer = EBTTrainer(
            model,
            training_args,
            train_dataset=graphs["train"],
            eval_dataset=graphs.get("validation"),
            data_collator=GraphCollator("graph"),
            compute_metrics=accuracy,
            run_facts=RunFacts(
                data=f"{source}: {len(graphs['train']):,} graphs{fold}",
                dataset=data_args.dataset_name,
                command=shlex.join(["ebt", "train", "graph", *argv]),
                base_model=model_args.model_name_or_path,
            ),
        )
    if checkpoint is not None:
        check_same_model(checkpoint, model)
    say_size(model)
    with refusing_bad_values():
        fit(trainer, train, checkpoint)
    names = {"validation": "eval", "test": "test"}
    for split, wanted in (("validation", validate), ("test", test)):
        if wanted and split in graphs:
            evaluate(trainer, graphs[split], names[split], ("loss", "accuracy"))
    compare_thinking(trainer, graph_args.eval_thinking_steps, lambda: _score(trainer, graphs))
    if train:
        save_graph_model(trainer, scaling)
    conclude(trainer)


def _score(trainer: "EBTTrainer", graphs: dict[str, list["Graph"]]) -> dict[str, float]:
    """Accuracies of the model as it is."""
    found: dict[str, float] = {}
    for split in ("validation", "test"):
        if split in graphs:
            metrics = trainer.predict(graphs[split], metric_key_prefix=split).metrics
            found |= {name: metrics[name] for name in (f"{split}_loss", f"{split}_accuracy")}
    return found


def main(argv: list[str] | None = None) -> None:
    """
    Run the script.

    Args:
        argv (`list[str]`, *optional*): command line without the program's name; `None` takes the process's own.

    Raises:
        SystemExit: after `--help`, and with a message for options that contradict each other or do not work.
    """
    _run(sys.argv[1:] if argv is None else list(argv))


if __name__ == "__main__":
    main()
