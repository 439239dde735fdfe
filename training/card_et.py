"""What a model card says of an Energy Transformer, or of its masked-autoencoder twin, in place of `card_sections`."""

import json
import math
from typing import TYPE_CHECKING, Any

from ..reporting import table
from .card_facts import PACKAGE, SPLITS, CardFacts, card_metadata, hub_ids, number, python_block
from .card_sections import ENERGY_LIMIT, SOFTWARE, bullets, curve


if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData
    from torch import nn

ARXIV = "[arXiv 2302.07253](https://arxiv.org/abs/2302.07253)"
MODEL_TYPE = "energy_transformer"
TWIN_TYPE = "vit_mae"
COMPLETION, NODES, GRAPHS = "image-to-image", "node-classification", "graph-classification"  # what a head is for
PIPELINE_TAGS = {COMPLETION: "image-to-image", NODES: "graph-ml", GRAPHS: "graph-ml"}  # the Hub's task of each
AUTO = {
    COMPLETION: "AutoModelForMaskedImageModeling",
    NODES: "AutoModelForTokenClassification",
    GRAPHS: "AutoModelForSequenceClassification",
}
ROWS = {COMPLETION: "images", NODES: "graphs", GRAPHS: "graphs"}
MEASURES = {
    "loss": "loss",
    "masked_mse": "mean squared error of masked patches",
    "masked_psnr": "PSNR of masked patches in dB",
    "energy_gap": "fall of the energy",
    "macro_f1": "macro-F1",
    "auc": "AUC",
    "threshold": "threshold",
    "accuracy": "accuracy",
}
# metrics as the Hub calls them, that a higher or lower value of says something about quality
HUB_METRICS = {"masked_mse": "mse", "masked_psnr": "psnr", "macro_f1": "f1", "auc": "roc_auc", "accuracy": "accuracy"}
CURVE = ("loss", *(f"eval_{name}" for name in MEASURES))
COMMON = ("hidden_size", "num_attention_heads", "head_dim", "num_memories", "hopfield", "self_attention", "num_blocks")
THINKING = ("thinking_steps", "step_size")
ARCHITECTURE = {
    COMPLETION: ("image_size", "patch_size", "num_channels", *COMMON, *THINKING, "mask_ratio", "completion_loss"),
    NODES: (
        *("num_node_features", "num_edge_features", "num_relations", "num_labels", *COMMON, *THINKING, "noise_std"),
        *("position_embedding", "num_positions", "edge_modulation", "class_weights", "label_smoothing"),
    ),
    GRAPHS: (
        *("num_node_features", "num_edge_features", "num_labels", *COMMON, *THINKING, "noise_std"),
        *("position_embedding", "num_positions", "edge_modulation", "class_weights", "label_smoothing"),
    ),
}
TWIN_ARCHITECTURE = (
    *("image_size", "patch_size", "num_channels", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("intermediate_size", "decoder_hidden_size", "decoder_num_hidden_layers", "mask_ratio"),
)
PAPER = """@inproceedings{hoover2023energy,
  title     = {Energy Transformer},
  author    = {Hoover, Benjamin and Liang, Yuchen and Pham, Bao and Panda, Rameswar and Strobelt, Hendrik and
               Chau, Duen Horng and Zaki, Mohammed J. and Krotov, Dmitry},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2023}
}"""


def covers(model: "nn.Module") -> bool:
    """Whether a model's card is written here: one with a head for images or graphs, or the twin."""
    return _is_twin(model) or (_model_type(model) == MODEL_TYPE and _auto_class(model) in AUTO.values())


def _model_type(model: "nn.Module") -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)


def _is_twin(model: "nn.Module") -> bool:
    return _model_type(model) == TWIN_TYPE


def _auto_class(model: "nn.Module") -> str | None:
    return getattr(model, "_auto_class", None)


def task_of(model: "nn.Module") -> str:
    """What the head of a model is for."""
    return next((task for task, auto in AUTO.items() if auto == _auto_class(model)), COMPLETION)


def rows_of(model: "nn.Module") -> str:
    """What a batch has several of."""
    return ROWS[task_of(model)]


# ---- head ------------------------------------------------------------------------------------------------------


def _split_and_measure(name: str) -> tuple[str | None, str]:
    prefix, _, measure = name.partition("_")
    return SPLITS.get(prefix), measure


def found_results(history: list[dict[str, Any]]) -> dict[str, float]:
    """Last values of the metrics in a log."""
    names = [f"{prefix}_{measure}" for prefix in SPLITS for measure in MEASURES]
    found = {}
    for name in ("train_loss", *names):
        value = next((entry[name] for entry in reversed(history) if name in entry), None)
        if value is not None:
            found[name] = value
    return found


def metadata(facts: CardFacts, model: "nn.Module", library: str = "transformers") -> "ModelCardData":
    """
    The head of a card, which the Hub reads.

    Args:
        facts ([`CardFacts`]): the run.
        model (`nn.Module`): tells the task.
        library (`str`, *optional*, defaults to `"transformers"`): what loads the saved model.
    """
    task = task_of(model)
    tasks = facts.metadata.get("tasks") or [PIPELINE_TAGS[task]]
    tags = [each for each in (facts.metadata.get("tags"), None if task == COMPLETION else task) if each]
    flat = [tag for each in tags for tag in ([each] if isinstance(each, str) else each)]
    told = CardFacts(**{**vars(facts), "metadata": {**facts.metadata, "tasks": tasks, "tags": flat}})
    data = card_metadata(told, model, library)
    data.eval_results = _eval_results(facts, task) or None
    return data


def _eval_results(facts: CardFacts, task: str) -> "list[EvalResult]":
    from huggingface_hub import EvalResult

    run = facts.run
    ids = hub_ids(facts.metadata.get("dataset_tags") or run.dataset)
    found = []
    for name, value in facts.results.items():
        split, measure = _split_and_measure(name)
        if split is None or measure not in HUB_METRICS or not math.isfinite(value):
            continue
        result = EvalResult(
            task_type=PIPELINE_TAGS[task],
            dataset_type=ids[0] if ids else ROWS[task],
            dataset_name=run.dataset or run.data or "not recorded",
            dataset_split=split,
            metric_type=HUB_METRICS[measure],
            metric_name=f"{split} {MEASURES[measure]}",
            metric_value=float(value),
        )
        found.append(result)
    return found


# ---- sections --------------------------------------------------------------------------------------------------


def summary(model: "nn.Module") -> str:
    """What kind of model it is."""
    kind = type(model).__name__
    if _is_twin(model):
        return (
            f"A masked autoencoder (`{kind}`) trained to complete images, the twin an Energy Transformer of as many "
            f"parameters is compared with ({ARXIV})."
        )
    does = {
        COMPLETION: "It completes images of which patches are masked",
        NODES: "It classifies the nodes of graphs",
        GRAPHS: "It classifies graphs",
    }[task_of(model)]
    return (
        f"An Energy Transformer (`{kind}`, {ARXIV}). {does}: its tokens descend an energy of attention and memory, "
        "one gradient step in closed form per thinking step."
    )


def use(model: "nn.Module", location: str, carries_code: bool) -> str:
    """
    How to load it: with the package, and without.

    Args:
        model (`nn.Module`): the model.
        location (`str`): what `from_pretrained` takes.
        carries_code (`bool`): whether the saved model holds the code it needs.
    """
    if _is_twin(model):
        load = f'model = ViTMAEForPreTraining.from_pretrained("{location}")'
        return python_block(f"from transformers import ViTMAEForPreTraining\n\n{load}")
    task = task_of(model)
    code = _use_completion(location) if task == COMPLETION else _use_graphs(model, location, task)
    if not carries_code:
        return f"{python_block(code)}\n\nThe package brings the code: none travels with these weights."
    remote = f"""
from transformers import {AUTO[task]}

model = {AUTO[task]}.from_pretrained("{location}", trust_remote_code=True)"""
    without = "Without the package, by the code that travels with the weights:"
    return "\n\n".join([python_block(code), without, python_block(remote)])


def _use_completion(location: str) -> str:
    return f"""
import ebt_transformers  # registers the models and the pipeline
from transformers import pipeline

complete = pipeline("image-completion", model="{location}")
complete("picture.png", mask_ratio=0.5)["image"].save("completed.png")"""


def _use_graphs(model: "nn.Module", location: str, task: str) -> str:
    config: Any = model.config
    kind = "node" if task == NODES else "graph"
    positions = f", num_positions={config.num_positions}" if config.position_embedding == "laplacian" else ""
    row = {
        "edge_index": [[0, 1, 1, 2], [1, 0, 2, 1]],
        "num_nodes": 3,
        "node_feat": f"[[0.0] * {config.num_node_features}] * 3",
    }
    if config.num_edge_features:
        row["edge_attr"] = f"[[0.0] * {config.num_edge_features}] * 4"
    if config.num_relations > 1:
        row["edge_type"] = [0, 0, 1, 1]
    items = ", ".join(f"{json.dumps(name)}: {value}" for name, value in row.items())
    return f"""
from transformers import {AUTO[task]}
from ebt_transformers import GraphCollator

model = {AUTO[task]}.from_pretrained("{location}")
graph = {{{items}}}  # every edge in both directions
batch = GraphCollator("{kind}"{positions})([graph])
probabilities = model(**batch, thinking_steps={config.thinking_steps}).logits.softmax(-1)"""


def results(facts: CardFacts, model: "nn.Module") -> str:
    """The metrics, what they mean, and the training curve."""
    rows = []
    for name, value in facts.results.items():
        split, measure = _split_and_measure(name)
        label = "training loss, mean over the run" if split is None else f"{split} {MEASURES[measure]}"
        rows.append([label, number(value)])
    parts = [table(["measure", "value"], rows)] if rows else []
    parts += [_explanation(model), curve(facts.history, CURVE)]
    return "\n\n".join(part for part in parts if part)


def _explanation(model: "nn.Module") -> str:
    config: Any = model.config
    task = task_of(model)
    if task == COMPLETION:
        return "Errors and PSNR are means over images. Every image has the same mask in every evaluation."
    smoothed = f", with label smoothing {config.label_smoothing}" if config.label_smoothing else ""
    weighed = ", weighted by class" if config.class_weights else ""
    loss = f"The loss is the cross-entropy in nats{weighed}{smoothed}."
    if task == GRAPHS:
        return f"{loss} Accuracy is the share of graphs whose most likely class is theirs."
    return (
        f"{loss} Macro-F1 is the mean over classes at the threshold, which was chosen on validation nodes; the AUC is "
        "the probability that an anomaly has a higher score than another node."
    )


def limits(facts: CardFacts, model: "nn.Module") -> str:
    """What the model cannot do, or nobody has looked at."""
    config: Any = model.config
    items = [*facts.run.limits]
    items.append("One training run. Nobody has examined its data, or what it says or shows, for bias or harm.")
    if _is_twin(model):
        return "\n".join(f"- {item}" for item in items)
    items.append(ENERGY_LIMIT)
    if task_of(model) == COMPLETION:
        items.append("It takes pictures of one size; masks of another kind or share than in training were not tried.")
    else:
        items.append("Features have to mean what they meant in training, in the same columns and units.")
        if config.position_embedding == "laplacian":
            items.append("The signs of Laplacian eigenvectors are arbitrary, and predictions may depend on them.")
        if config.position_embedding == "learned":
            items.append("Every node of its one graph has a learned position: it takes no other graph.")
    return "\n".join(f"- {item}" for item in items)


def architecture(model: "nn.Module") -> str:
    """Size and shape."""
    names = TWIN_ARCHITECTURE if _is_twin(model) else ARCHITECTURE[task_of(model)]
    items: dict[str, Any] = {"parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}"}
    values = ((name, getattr(model.config, name, None)) for name in names)
    items.update((name, value) for name, value in values if value is not None)
    return bullets(items)


def citation(facts: CardFacts) -> str:
    """BibTeX of the paper and of this software."""
    software = SOFTWARE.replace("VERSION", facts.versions.get(PACKAGE, "unknown"))
    return f"```bibtex\n{PAPER}\n\n{software}\n```"


__all__ = [
    "architecture",
    "citation",
    "covers",
    "found_results",
    "limits",
    "metadata",
    "results",
    "rows_of",
    "summary",
    "use",
]
