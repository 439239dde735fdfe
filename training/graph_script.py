"""What `ebt train anomaly` and `ebt train graph` share: which graphs, which model, and what is done with both."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data_arguments import wanted_splits
from .script import Refusal, as_flags, given_options, own_fields, parse_overrides, say


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..configuration import EnergyTransformerConfig
    from .graph_data import Standardisation
    from .trainer import EBTTrainer

TRAINING_OPTIONS = "--early_stopping_patience and --early_stopping_threshold"
THINKING_RESULTS = "thinking_results.json"
ARCHIVE = ".npz"
FILES = ("train_file", "validation_file", "test_file")
# config fields with an option of their own
OWN_FIELDS = (
    *("hidden_size", "num_attention_heads", "num_memories", "num_blocks", "thinking_steps", "step_size", "noise_std"),
    *("position_embedding", "num_positions", "edge_modulation", "label_smoothing"),
)


@dataclass
class GraphModelArguments:
    """Which model: a new one, or one to train further. Without options the script chooses (see above)."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Train this model further: a folder or a Hub id. Default: a new model."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code that comes with --model_name_or_path."}
    )
    hidden_size: int | None = field(default=None, metadata={"help": "Width of a token. Default: 64."})
    num_attention_heads: int | None = field(default=None, metadata={"help": "Heads of the energy attention."})
    num_memories: int | None = field(default=None, metadata={"help": "Patterns that the Hopfield memory keeps."})
    num_blocks: int | None = field(default=None, metadata={"help": "Blocks, descended one after another."})
    thinking_steps: int | None = field(default=None, metadata={"help": "Steps down the energy of each block."})
    step_size: float | None = field(default=None, metadata={"help": "Size of a step. Default: 0.1."})
    noise_std: float | None = field(default=None, metadata={"help": "Noise of every step in training."})
    position_embedding: str | None = field(
        default=None,
        metadata={"help": "Where a node is: none, laplacian (eigenvectors) or learned (for one graph only)."},
    )
    num_positions: int | None = field(
        default=None, metadata={"help": "Eigenvectors of --position_embedding laplacian. Default: 15."}
    )
    edge_modulation: str | None = field(
        default=None,
        metadata={
            "help": "pairwise: edges weigh by their nodes and features. Default: pairwise if there are features."
        },
    )
    label_smoothing: float | None = field(default=None, metadata={"help": "Label smoothing of the loss."})
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Further config fields of a new model, e.g. hopfield=softmax,self_attention=true."},
    )


@dataclass
class GraphRunArguments:
    """What is looked at in the end, and how features are prepared."""

    eval_thinking_steps: list[int] | None = field(
        default=None,
        metadata={"help": "Evaluate with these numbers of thinking steps, too, e.g. 1 2 4 8; a table is written."},
    )
    standardise: bool = field(
        default=True,
        metadata={
            "help": "Train on node features of mean 0 and deviation 1 (of what trains; columns of 0 and 1 stay). The "
            "saved model takes features as they are."
        },
    )


# ---- checks ----------------------------------------------------------------------------------------------------


def check_graph_options(model: Any, data: Any, run: GraphRunArguments) -> None:
    """
    Refuses combinations of which one half would be ignored, and graphs that are not named.

    Args:
        model ([`GraphModelArguments`]), data, run ([`GraphRunArguments`]): the options; `data` has `dataset_name`,
            `dataset_config_name` and some of `FILES` and the options of splits.
    """
    if model.model_name_or_path is None:
        if model.trust_remote_code:
            raise Refusal("--trust_remote_code has an effect with --model_name_or_path only.")
    else:
        unused = given_options(model, (*OWN_FIELDS, "config_overrides"))
        if unused:
            raise Refusal(
                f"{as_flags(unused)} would change the architecture of {model.model_name_or_path}, which is trained "
                "further as it is. Leave them out, or leave --model_name_or_path out for a new model."
            )
    files = [name for name in FILES if getattr(data, name, None) is not None]
    if data.dataset_name is not None and files:
        raise Refusal(f"--dataset_name and {as_flags(files)} both name the data. Give one of them.")
    if data.dataset_name is None and data.train_file is None:
        raise Refusal(
            "Say which graphs to train on: --train_file with an .npz, .parquet or .jsonl file, or --dataset_name with "
            "a Hub id."
        )
    of_named = ("dataset_config_name", "train_split", "validation_split", "test_split")
    given = [name for name in of_named if getattr(data, name, None) is not None]
    if given and data.dataset_name is None:
        raise Refusal(f"{as_flags(given)} needs --dataset_name.")
    low = [count for count in run.eval_thinking_steps or [] if count < 1]
    if low:
        raise Refusal(f"--eval_thinking_steps must be at least 1, got {low[0]}.")


def archive_of(data: Any) -> str | None:
    """The `.npz` file that `--train_file` names, None if it names none; refuses one beside other files."""
    names = [name for option in FILES for name in getattr(data, option, None) or []]
    archives = [name for name in names if name.lower().endswith(ARCHIVE)]
    if archives and (len(names) > 1 or data.train_file != archives):
        raise Refusal(f"{archives[0]} is read alone: give it as the only file, --train_file.")
    return archives[0] if archives else None


def graph_tables(data: Any) -> dict[str, Any]:
    """
    Tables of graphs, by split.

    Args:
        data: the options.

    Raises:
        FileNotFoundError, ValueError: for data that cannot be read, saying why.
    """
    from .text_loading import load_files, load_named

    if data.train_file is not None:
        named = {name.removesuffix("_file"): getattr(data, name, None) for name in FILES}
        return load_files({split: paths for split, paths in named.items() if paths})
    wanted = wanted_splits(data) if hasattr(data, "test_split") else {"train": data.train_split}
    return load_named(data.dataset_name, data.dataset_config_name, splits=wanted)


# ---- model -----------------------------------------------------------------------------------------------------


def graph_config(
    model: GraphModelArguments, defaults: dict[str, Any], of_data: dict[str, Any], edge_features: int
) -> "EnergyTransformerConfig":
    """
    Config of a new model.

    Args:
        model ([`GraphModelArguments`]): what was asked for.
        defaults (`dict`): config fields where nothing was; `memories` stands for `num_memories / hidden_size`.
        of_data (`dict`): config fields that follow from the data.
        edge_features (`int`): numbers that describe an edge; a model without modulation leaves them out.

    Raises:
        ValueError: as [`EnergyTransformerConfig`].
    """
    from ..configuration import EnergyTransformerConfig

    overrides = parse_overrides(model.config_overrides, EnergyTransformerConfig)
    fixed = sorted({*of_data, "num_edge_features"} & set(overrides))
    if fixed:
        raise Refusal(f"--config_overrides: {', '.join(fixed)} follows from the data. Leave it out.")
    values = {**defaults, **own_fields(model, OWN_FIELDS, overrides), **overrides}
    memories = values.pop("memories")
    values.setdefault("num_memories", memories * values["hidden_size"])
    values.setdefault("edge_modulation", "pairwise" if edge_features else "none")
    if values["edge_modulation"] == "pairwise":
        values["num_edge_features"] = edge_features
    elif edge_features:
        say(f"The {edge_features} features of edges are left out (--edge_modulation pairwise uses them).")
    return EnergyTransformerConfig(**{**values, **of_data})


def load_graph_model(model: GraphModelArguments, auto: Any, of_data: dict[str, Any]) -> "PreTrainedModel":
    """
    The model to train further.

    Args:
        model ([`GraphModelArguments`]): names it.
        auto: the Auto class that loads it.
        of_data (`dict`): config fields that follow from the data; the model has to have the same.
    """
    import torch
    from transformers import AutoConfig

    name, remote = model.model_name_or_path, model.trust_remote_code
    config = AutoConfig.from_pretrained(name, trust_remote_code=remote)
    if config.model_type != "energy_transformer":
        raise Refusal(f"{name} is a {config.model_type} model, not an Energy Transformer.")
    other = [field for field, value in of_data.items() if getattr(config, field) != value]
    if other:
        raise Refusal(
            f"{name} does not fit the data: `{other[0]}` is {getattr(config, other[0])} there and "
            f"{of_data[other[0]]} here."
        )
    return auto.from_pretrained(name, config=config, dtype=torch.float32, trust_remote_code=remote)


# ---- run -------------------------------------------------------------------------------------------------------


def evaluate(trainer: "EBTTrainer", graphs: Any, split: str, shown: tuple[str, ...]) -> dict[str, float]:
    """
    Evaluates, tells the metrics in one line, and writes `<split>_results.json`.

    Args:
        trainer ([`EBTTrainer`]): with `compute_metrics`.
        graphs: what to evaluate on.
        split (`str`): `"eval"` or `"test"`.
        shown (`tuple[str, ...]`): metrics to tell.

    Returns:
        The metrics, by name with the split before.
    """
    metrics = trainer.evaluate(graphs, metric_key_prefix=split)
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)
    name = "Validation" if split == "eval" else "Test"
    say(f"{name}: " + ", ".join(f"{each} {metrics[f'{split}_{each}']:.4f}" for each in shown))
    return metrics


def compare_thinking(
    trainer: "EBTTrainer", counts: list[int] | None, score: Callable[[], dict[str, float]]
) -> list[dict[str, float]]:
    """
    Scores the trained model with other numbers of thinking steps than it was trained with; writes
    `thinking_results.json`, and the table into the model card.

    Args:
        trainer ([`EBTTrainer`]): with the model.
        counts (`list[int]`, *optional*): numbers of steps; none, nothing to do.
        score (`Callable`): evaluates the model as it is.

    Returns:
        For each number of steps the metrics, with `thinking_steps`.
    """
    if not counts:
        return []
    from ..reporting import table
    from .model_card import trained_model

    config: Any = trained_model(trainer).config
    trained = config.thinking_steps
    rows = []
    try:
        for count in sorted(set(counts)):
            config.thinking_steps = count
            rows.append({"thinking_steps": count, **score()})
    finally:
        config.thinking_steps = trained
    cells = [[str(row["thinking_steps"]), *(f"{value:.4f}" for value in list(row.values())[1:])] for row in rows]
    shown = table([name.replace("_", " ") for name in rows[0]], cells)
    say(f"Thinking more or fewer steps than the {trained} of training:\n\n{shown}\n")
    trainer.run_facts.notes.append(f"With more or fewer thinking steps than the {trained} of training:\n\n{shown}")
    if trainer.is_world_process_zero():
        content = {"trained_thinking_steps": trained, "rows": rows}
        path = Path(trainer.args.output_dir) / THINKING_RESULTS
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return rows


def save_graph_model(trainer: "EBTTrainer", scaling: "Standardisation | None") -> None:
    """Saves the model and its card; what was done to the features becomes a part of the weights."""
    from .model_card import trained_model

    if scaling is not None:
        model: Any = trained_model(trainer)
        scaling.build_into(model.nodes.features)
    trainer.save_model()
    say(f"Saved to {trainer.args.output_dir}.")
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


__all__ = [
    "THINKING_RESULTS",
    "TRAINING_OPTIONS",
    "GraphModelArguments",
    "GraphRunArguments",
    "archive_of",
    "check_graph_options",
    "compare_thinking",
    "evaluate",
    "graph_config",
    "graph_tables",
    "load_graph_model",
    "save_graph_model",
]
