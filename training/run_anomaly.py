r"""
Train an Energy Transformer that finds anomalous nodes of one graph, such as fraud among customers.

    ebt train anomaly --output_dir runs/amazon --train_file amazon.npz --train_share 0.4
    ebt train anomaly --output_dir runs/one_percent --train_file amazon.npz --train_share 0.01 --split_seed 1

The graph is an .npz file (features `x`, labels `y` with 1 for anomalies, `edge_index`; several kinds of edges as
`edge_index_<name>`), or a table with one row. A share of the labels trains, a third of the others chooses the best
weights and the threshold, the rest tests. Every step sees the whole graph; anomalies weigh in the loss as much as
all other nodes together.

A new model is the paper's: one block, 2 thinking steps, width 64, one head, twice as many memories as the width;
learning rate 1e-3, 100 epochs of one step each.

The same command started again goes on from its last checkpoint. At the end the model is tested with the threshold
that validation chose (`test_results.json`), and saved with its model card. `--eval_thinking_steps 1 2 4 8` also tests
it with other numbers of steps.
"""

import shlex
import sys
from dataclasses import dataclass, field
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
    from .arguments_et import AnomalyTrainingArguments
    from .graph_data import Graph
    from .trainer import EBTTrainer

RELATIONS = ("merged", "separate")
DEFAULTS = {
    "hidden_size": 64,
    "num_attention_heads": 1,
    "memories": 2,
    "num_blocks": 1,
    "thinking_steps": 2,
    # at the 0.02 of other weights neighbours hardly move a node at first (benchmarks/results/anomaly.md)
    "attention_initializer_range": 0.1,
}
SHOWN = ("macro_f1", "auc", "threshold")


@dataclass
class AnomalyDataArguments:
    """Which graph, and which of its nodes train."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "A Hub id, a local folder or file with a table of one graph."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    train_file: list[str] | None = field(
        default=None, metadata={"help": "The graph: an .npz file, or a .parquet or .jsonl file with one row."}
    )
    train_split: str | None = field(default=None, metadata={"help": "Split of --dataset_name. Default: train."})
    train_share: float = field(
        default=0.4, metadata={"help": "Share of the labelled nodes that trains; the paper: 0.01 and 0.4."}
    )
    split_seed: int = field(default=0, metadata={"help": "Which nodes these are: another seed, another split."})
    relations: str = field(
        default="merged",
        metadata={"help": "Kinds of edges: merged, or separate (each has an attention of its own)."},
    )


def _training_class() -> "type[AnomalyTrainingArguments]":
    from .arguments_et import AnomalyTrainingArguments

    return AnomalyTrainingArguments


def _load_graph(data: AnomalyDataArguments) -> tuple["Graph", int]:
    """The graph, and how many kinds of edges it has."""
    from .graph_data import Graph, load_anomaly, merge_relations

    archive = archive_of(data)
    if archive is not None:
        row = load_anomaly(archive)
    else:
        table = graph_tables(data)["train"]
        if len(table) != 1:
            raise Refusal(
                f"The table has {len(table)} rows, and must have one: the graph (ebt train graph takes many)."
            )
        row = table[0]
    several = row.get("edge_type") is not None
    if data.relations == "separate" and not several:
        raise Refusal("--relations separate: all edges of this graph are of one kind.")
    if several and data.relations == "merged":
        row = merge_relations(row)
    graph = Graph.from_row(row, "node")
    if graph.label is None or set(graph.label.tolist()) - {-100} != {0, 1}:
        found = "none" if graph.label is None else ", ".join(map(str, sorted(set(graph.label.tolist()))))
        raise Refusal(f"Labels must be 0 and 1 (an anomaly), or -100 where unknown; the graph has {found}.")
    kinds = 1 if graph.edge_type is None else int(graph.edge_type.max()) + 1
    return graph, kinds


def _test(trainer: "EBTTrainer", graphs: dict[str, Any], threshold: float) -> None:
    from .thresholds import AnomalyMetrics

    trainer.compute_metrics = AnomalyMetrics(threshold)
    evaluate(trainer, graphs["test"], "test", SHOWN)


def _run(argv: list[str]) -> None:
    own = (GraphModelArguments, AnomalyDataArguments, GraphRunArguments, RunArguments)
    parsed = parse_command_line(argv, "anomaly", __doc__, own, _training_class, TRAINING_OPTIONS)
    model_args, data_args, graph_args, run_args, training_args = parsed
    check_graph_options(model_args, data_args, graph_args)
    if data_args.relations not in RELATIONS:
        raise Refusal(f"--relations must be one of {', '.join(RELATIONS)}, got {data_args.relations!r}.")
    if not 0 < data_args.train_share < 1:
        raise Refusal(f"--train_share must be above 0 and below 1, got {data_args.train_share}.")
    from transformers import AutoModelForTokenClassification, set_seed

    from .graph_data import GraphCollator, Standardisation, node_splits
    from .model_card import RunFacts
    from .thresholds import AnomalyMetrics
    from .trainer import EBTTrainer

    checkpoint = start_point(training_args, run_args.overwrite)
    train, validate, test, checkpoint = plan_phases(argv, training_args, checkpoint)
    set_seed(training_args.seed)
    with training_args.main_process_first(desc="reading the graph"), refusing_bad_values():
        graph, kinds = _load_graph(data_args)
        assert graph.label is not None  # checked above
        masks = node_splits(graph.label.numpy(), data_args.train_share, data_args.split_seed)
        normal = int((graph.label.numpy()[masks[0]] == 0).sum())
        anomalies = int(masks[0].sum()) - normal
        of_data = {"num_node_features": graph.node_features.shape[1], "num_relations": kinds, "num_labels": 2}
        if model_args.model_name_or_path is None:
            edge_features = 0 if graph.edge_features is None else graph.edge_features.shape[1]
            defaults = {**DEFAULTS, "class_weights": [1.0, normal / anomalies]}
            if model_args.position_embedding == "learned":
                defaults["num_positions"] = len(graph.node_features)
            config = graph_config(model_args, defaults, of_data, edge_features)
            model = AutoModelForTokenClassification.from_config(config)
        else:
            model = load_graph_model(model_args, AutoModelForTokenClassification, of_data)
            config = model.config
            config.class_weights = [1.0, normal / anomalies]
        graph, scaling = _prepare(graph, config, Standardisation.of(graph.node_features[masks[0]]), graph_args)
        if scaling is not None and model_args.model_name_or_path is not None:
            scaling.take_out_of(model.nodes.features)
        collator = GraphCollator("node")
    say(
        f"{len(graph.node_features):,} nodes, {graph.edge_index.shape[1]:,} edges (both directions counted). "
        f"{masks[0].sum():,} nodes ({anomalies} anomalies) train, {masks[1].sum():,} validate, {masks[2].sum():,} "
        "test."
    )
    graphs = {
        name: [graph.with_labels(mask)] for name, mask in zip(("train", "validation", "test"), masks, strict=True)
    }
    source = data_args.dataset_name or " ".join(data_args.train_file or [])
    with refusing_bad_values():
        trainer = EBTTrainer(
            model,
            training_args,
            train_dataset=graphs["train"],
            eval_dataset=graphs["validation"],
            data_collator=collator,
            compute_metrics=AnomalyMetrics(),
            run_facts=RunFacts(
                data=f"{source}: {masks[0].sum():,} of its {len(graph.node_features):,} nodes, {anomalies} of them "
                f"anomalies (share {data_args.train_share}, split {data_args.split_seed})",
                dataset=data_args.dataset_name,
                command=shlex.join(["ebt", "train", "anomaly", *argv]),
                base_model=model_args.model_name_or_path,
                limits=["It was trained and tested on one graph; nothing is known of its use on another one."],
            ),
        )
    if checkpoint is not None:
        check_same_model(checkpoint, model)
    say_size(model)
    fit(trainer, train, checkpoint)
    with refusing_bad_values():
        if validate or test:
            # the threshold comes from validation whatever is asked for: the test labels must not choose it
            threshold = evaluate(trainer, graphs["validation"], "eval", SHOWN)["eval_threshold"]
            trainer.run_facts.notes.append(
                f"A node is taken for an anomaly if its probability is above {threshold}, the threshold that was best "
                "for macro-F1 on the validation nodes."
            )
            if test:
                _test(trainer, graphs, threshold)
        compare_thinking(trainer, graph_args.eval_thinking_steps, lambda: _score(trainer, graphs))
    if train:
        save_graph_model(trainer, scaling)
    conclude(trainer)


def _prepare(graph: "Graph", config: Any, scaling: Any, run: GraphRunArguments) -> tuple["Graph", Any]:
    """The graph as the model takes it, and how its features were standardised, if they were."""
    from dataclasses import replace

    if run.standardise:
        graph = replace(graph, node_features=scaling.apply(graph.node_features))
    if config.edge_modulation == "none":
        graph = replace(graph, edge_features=None)
    if config.self_attention:
        graph = graph.with_self_loops()
    positions = config.num_positions if config.position_embedding == "laplacian" else None
    graph = replace(graph, positions=None) if positions is None else graph.with_positions(positions)
    return graph, scaling if run.standardise else None


def _score(trainer: "EBTTrainer", graphs: dict[str, Any]) -> dict[str, float]:
    """Validation and test metrics of the model as it is, with the threshold that validation chooses."""
    from .thresholds import AnomalyMetrics

    trainer.compute_metrics = AnomalyMetrics()
    found = trainer.predict(graphs["validation"], metric_key_prefix="validation").metrics
    trainer.compute_metrics = AnomalyMetrics(found["validation_threshold"])
    found |= trainer.predict(graphs["test"], metric_key_prefix="test").metrics
    wanted = ("validation_macro_f1", "validation_auc", "validation_threshold", "test_macro_f1", "test_auc")
    return {name: found[name] for name in wanted}


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
