"""What benchmarks/graph_classification.py fits: sets of graphs with folds, and the models. Not a script."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional
from torch_geometric.nn import global_add_pool
from torch_geometric.nn.models import GIN

from ebt_transformers import EnergyTransformerConfig, EnergyTransformerForGraphClassification
from ebt_transformers.training.graph_data import Graph, GraphCollator, load_tu


ET, GIN_NAME, MAJORITY = "ET", "GIN", "majority class"
POSITIONS = 15  # Laplacian eigenvectors
VALIDATION_SHARE = 0.1  # of the graphs that are not for testing
SMOOTHING, DECAY, CLIP = 0.05, 0.05, 1.0

# what each model is tried with: settings of its own, and one change at a time
BASE: dict[str, dict[str, Any]] = {
    ET: {
        **{"hidden": 32, "blocks": 2, "T": 2, "alpha": 0.1, "init": 0.1, "lr": 3e-3},
        **{"laplacian": True, "modulation": False, "noise": 0.02},
    },
    GIN_NAME: {"hidden": 32, "layers": 4, "lr": 1e-3, "dropout": 0.5, "norm": True},
}
CHANGES: dict[str, list[dict[str, Any]]] = {
    ET: [{}, {"laplacian": False}, {"modulation": True}, {"noise": 0.0}, {"lr": 1e-3}, {"alpha": 1.0}, {"hidden": 64}],
    GIN_NAME: [{}, {"layers": 2}, {"dropout": 0.0}, {"norm": False}, {"lr": 3e-3}, {"layers": 6}, {"hidden": 64}],
}
TRIES = {model: [{**BASE[model], **change} for change in changes] for model, changes in CHANGES.items()}


@dataclass(frozen=True)
class Fold:
    """
    The graphs of one fold.

    Args:
        train, validation, test (list of [`Graph`]): of each part.
    """

    train: list[Graph]
    validation: list[Graph]
    test: list[Graph]


@dataclass(frozen=True)
class GraphSet:
    """
    One data set.

    Args:
        name (`str`): of its file.
        graphs (list of [`Graph`]): all of them, with positions.
        folds (`np.ndarray` of `int`): the fold, from 1, in which each is tested; -1 for those that only train.
        classes (`int`): how many.
    """

    name: str
    graphs: list[Graph]
    folds: np.ndarray
    classes: int

    @classmethod
    def load(cls, path: Path) -> "GraphSet":
        """Reads a file of `data/graphs/tu`."""
        table, folds = load_tu(path)
        if folds is None:
            raise ValueError(f"{path} has no `test_fold`: this benchmark needs the folds.")
        graphs = [Graph.from_row(row).with_positions(POSITIONS) for row in table.with_format("numpy")]
        return cls(path.stem, graphs, folds, 1 + max(int(graph.label) for graph in graphs))

    def fold(self, number: int) -> Fold:
        """Graphs of fold `number` (from 1) test; a tenth of the others, stratified, validates."""
        others = np.flatnonzero(self.folds != number)
        labels = [int(self.graphs[i].label) for i in others]
        train, validation = train_test_split(others, test_size=VALIDATION_SHARE, stratify=labels, random_state=number)
        tested = np.flatnonzero(self.folds == number)
        return Fold(*([self.graphs[i] for i in part] for part in (train, validation, tested)))

    def about(self) -> dict[str, int]:
        """Its numbers."""
        return {
            "graphs": len(self.graphs),
            "classes": self.classes,
            "nodes": sum(len(graph.node_features) for graph in self.graphs),
            "edges": sum(graph.edge_index.shape[1] for graph in self.graphs) // 2,
            "features": self.graphs[0].node_features.shape[1],
            "in_no_fold": int((self.folds < 0).sum()),
        }


# ---- models ----------------------------------------------------------------------------------------------------


class GINClassifier(nn.Module):
    """
    torch_geometric's GIN, the sum over a graph's nodes of what all layers found, and two linear maps.

    Args:
        features, classes (`int`): numbers that describe a node, and classes.
        setting (`dict`): one of its `TRIES`.
    """

    def __init__(self, features: int, classes: int, setting: dict[str, Any]) -> None:
        super().__init__()
        hidden = setting["hidden"]
        norm = "batch_norm" if setting["norm"] else None
        self.layers = GIN(features, hidden, setting["layers"], out_channels=hidden, norm=norm, jk="cat")
        self.classifier = nn.Sequential(
            nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(setting["dropout"]), nn.Linear(hidden, classes)
        )

    def forward(self, node_features: Tensor, edge_index: Tensor, graph_index: Tensor) -> Tensor:
        """Scores `(G, classes)` of the graphs of a batch."""
        return self.classifier(global_add_pool(self.layers(node_features, edge_index), graph_index))


def make_network(model: str, setting: dict[str, Any], features: int, classes: int) -> nn.Module:
    """
    A network with random weights.

    Args:
        model (`str`): `"ET"` or `"GIN"`.
        setting (`dict`): one of its `TRIES`.
        features, classes (`int`): numbers that describe a node, and classes.
    """
    if model == GIN_NAME:
        return GINClassifier(features, classes, setting)
    config = EnergyTransformerConfig(
        hidden_size=setting["hidden"],
        num_attention_heads=2,
        num_memories=2 * setting["hidden"],
        num_blocks=setting["blocks"],
        thinking_steps=setting["T"],
        step_size=setting["alpha"],
        initializer_range=setting["init"],
        noise_std=setting["noise"],
        position_embedding="laplacian" if setting["laplacian"] else "none",
        edge_modulation="pairwise" if setting["modulation"] else "none",
        num_node_features=features,
        num_labels=classes,
    )
    return EnergyTransformerForGraphClassification(config)


def logits_of(network: nn.Module, batch: dict[str, Tensor], **thinking: int) -> Tensor:
    """Scores `(G, classes)` of any network."""
    inputs = {name: batch[name] for name in ("node_features", "edge_index", "graph_index")}
    if not isinstance(network, EnergyTransformerForGraphClassification):
        return network(**inputs)
    if network.config.position_embedding == "laplacian":
        inputs["positions"] = batch["positions"]
    return network(**inputs, **thinking).logits


# ---- fitting ---------------------------------------------------------------------------------------------------


def batches(
    graphs: Sequence[Graph], size: int, generator: torch.Generator | None = None
) -> Iterator[dict[str, Tensor]]:
    """Graphs in batches; shuffled if there is a generator."""
    order = torch.arange(len(graphs)) if generator is None else torch.randperm(len(graphs), generator=generator)
    collate = GraphCollator()
    for chosen in order.split(size):
        yield collate([graphs[i] for i in chosen.tolist()])


@torch.no_grad()
def judge(network: nn.Module, graphs: Sequence[Graph], size: int, **thinking: int) -> tuple[float, float]:
    """Accuracy and mean cross-entropy."""
    network.eval()
    right, loss = 0, 0.0
    for batch in batches(graphs, size):
        logits = logits_of(network, batch, **thinking)
        right += int((logits.argmax(-1) == batch["labels"]).sum())
        loss += float(functional.cross_entropy(logits, batch["labels"], reduction="sum"))
    return right / len(graphs), loss / len(graphs)


def fit(network: nn.Module, fold: Fold, rate: float, epochs: int, size: int, seed: int) -> dict[str, Any]:
    """
    AdamW with a cosine schedule; the network is left with its weights of the epoch that was best on validation: the
    highest accuracy and, of equals, the lowest loss.

    Args:
        network (`nn.Module`): gets fitted.
        fold ([`Fold`]): what to fit.
        rate (`float`): highest learning rate.
        epochs, size (`int`): passes over the graphs, graphs of a batch.
        seed (`int`): of the order of the graphs.

    Returns:
        `dict`: `validation` (accuracy), `epoch` (the best, from 1), `seconds`.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=DECAY)
    updates = epochs * math.ceil(len(fold.train) / size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=updates, pct_start=0.1, cycle_momentum=False
    )
    best, best_epoch, kept = (-1.0, 0.0), 0, network.state_dict()
    started = time.perf_counter()
    for epoch in range(1, epochs + 1):
        network.train()
        for batch in batches(fold.train, size, generator):
            loss = functional.cross_entropy(logits_of(network, batch), batch["labels"], label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), CLIP)
            optimizer.step()
            schedule.step()
        accuracy, lost = judge(network, fold.validation, size)
        if (accuracy, -lost) > best:
            best, best_epoch, kept = (accuracy, -lost), epoch, copy.deepcopy(network.state_dict())
    seconds = time.perf_counter() - started
    network.load_state_dict(kept)
    return {"validation": best[0], "epoch": best_epoch, "seconds": seconds}


def run_network(
    model: str, setting: dict[str, Any], data: GraphSet, fold: Fold, seed: int, epochs: int, size: int
) -> tuple[dict[str, Any], Callable[..., float]]:
    """
    Fits and judges a network.

    Args:
        model, setting: as in [`make_network`].
        data ([`GraphSet`]), fold ([`Fold`]): what to fit.
        seed (`int`): of the weights and the order of the graphs.
        epochs, size: as in [`fit`].

    Returns:
        What was found, and a function that gives the test accuracy for thinking options.
    """
    torch.manual_seed(seed)
    network = make_network(model, setting, data.about()["features"], data.classes)
    found = fit(network, fold, setting["lr"], epochs, size, seed)

    def test(**thinking: int) -> float:
        return judge(network, fold.test, size, **thinking)[0]

    parameters = sum(parameter.numel() for parameter in network.parameters())
    return {**found, "parameters": parameters, "train": judge(network, fold.train, size)[0], "test": test()}, test


def majority(fold: Fold) -> float:
    """Test accuracy of the class that is most frequent in training and validation."""
    seen = [int(graph.label) for graph in (*fold.train, *fold.validation)]
    most = int(np.bincount(seen).argmax())
    return sum(int(graph.label) == most for graph in fold.test) / len(fold.test)


__all__ = [
    "ET",
    "GIN_NAME",
    "MAJORITY",
    "TRIES",
    "Fold",
    "GINClassifier",
    "GraphSet",
    "batches",
    "fit",
    "judge",
    "logits_of",
    "majority",
    "make_network",
    "run_network",
]
