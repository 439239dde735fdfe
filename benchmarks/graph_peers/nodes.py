"""What benchmarks/anomaly.py fits: a graph whose nodes are to be judged, its splits, and the models. Not a script."""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score
from torch import Tensor, nn
from torch.nn import functional
from torch_geometric.nn.models import GCN, GraphSAGE

from ebt_transformers import EnergyTransformerConfig, EnergyTransformerForNodeClassification
from ebt_transformers.training.graph_data import UNKNOWN, Standardisation, load_anomaly, node_splits


THRESHOLDS = np.linspace(0.05, 0.95, 19)
ET = "ET"
AMAZON = "amazon_upu"
ATTENTION_SPREAD = 0.1  # at 0.02 neighbours hardly move a node at first
LARGEST = 10.0  # deviations from the mean: what hardly varies among few training nodes may do so elsewhere

# What each model is tried with: the first values, then one thing after the other, the best so far kept. Five tries.
RATES = (1e-3, 1e-2)
STAGES: dict[str, dict[str, tuple[Any, ...]]] = {
    ET: {"lr": RATES, "alpha": (0.1, 1.0), "T": (2, 1, 3)},
    "GCN": {"lr": RATES, "dropout": (0.0, 0.25, 0.5), "layers": (2, 3)},
    "GraphSAGE": {"lr": RATES, "dropout": (0.0, 0.25, 0.5), "layers": (2, 3)},
    "gradient boosting": {"lr": (0.1, 0.03), "leaf": (20, 10, 5, 2)},
    "logistic regression": {"C": (1e-3, 1e-2, 1e-1, 1.0, 10.0)},
}
NETWORKS = (ET, "GCN", "GraphSAGE")


@dataclass(frozen=True)
class Split:
    """
    A graph as one split sees it.

    Args:
        features (`torch.FloatTensor` of shape `(N, F)`): standardised on the training nodes, at most ten deviations.
        edge_index (`torch.LongTensor` of shape `(2, E)`): both directions of every edge.
        labels (`torch.LongTensor` of shape `(N,)`): 1 for anomalies.
        train, validation, test (`torch.LongTensor`): the nodes of each part.
    """

    features: Tensor
    edge_index: Tensor
    labels: Tensor
    train: Tensor
    validation: Tensor
    test: Tensor

    @cached_property
    def adjacency(self) -> Tensor:
        """The edges as torch_geometric takes them fastest: a sparse matrix of ones."""
        count = len(self.labels)
        size, ones = (count, count), torch.ones(self.edge_index.shape[1])
        edges = torch.sparse_coo_tensor(self.edge_index.flip(0), ones, size, check_invariants=False)
        return edges.coalesce().to_sparse_csr()

    @cached_property
    def weight(self) -> float:
        """Weight of an anomaly in the loss: normal nodes for each anomaly in training."""
        anomalies = int(self.labels[self.train].sum())
        return (len(self.train) - anomalies) / anomalies


@dataclass(frozen=True)
class Graph:
    """
    One data set.

    Args:
        name (`str`): of its file.
        features (`torch.FloatTensor` of shape `(N, F)`): of every node, as they come.
        edge_index (`torch.LongTensor` of shape `(2, E)`): both directions of every edge, no loops.
        labels (`torch.LongTensor` of shape `(N,)`): 1 for anomalies, 0 for normal nodes, -100 if unknown.
    """

    name: str
    features: Tensor
    edge_index: Tensor
    labels: Tensor

    @classmethod
    def load(cls, path: Path) -> "Graph":
        """
        Reads a file of `data/graphs/anomaly`.

        The Amazon set begins with 3,305 users nobody has labelled, which count as normal in the file. Our copy lacks
        nodes without edges, so that their number is not known; but no anomaly can be among them, and those before the
        first one (2,295) are taken to be these.
        """
        row = load_anomaly(path)
        features, edges, labels = (torch.from_numpy(row[name]) for name in ("node_feat", "edge_index", "y"))
        if path.stem == AMAZON:
            labels[: int((labels == 1).nonzero()[0])] = UNKNOWN
        return cls(path.stem, features, edges, labels)

    def about(self) -> dict[str, int]:
        """Its numbers."""
        return {
            "nodes": len(self.labels),
            "labelled": int((self.labels != UNKNOWN).sum()),
            "anomalies": int((self.labels == 1).sum()),
            "edges": self.edge_index.shape[1] // 2,
            "features": self.features.shape[1],
        }

    def split(self, share: float, seed: int) -> Split:
        """
        Stratified parts: of the nodes that are not for training a third is for validation, the others for testing.

        Args:
            share (`float`): of the labelled nodes, for training.
            seed (`int`): of the split.
        """
        masks = node_splits(self.labels.numpy(), share, seed)
        train, validation, test = (torch.from_numpy(np.flatnonzero(mask)) for mask in masks)
        features = Standardisation.of(self.features[train]).apply(self.features).clamp(-LARGEST, LARGEST)
        return Split(features, self.edge_index, self.labels, train, validation, test)


# ---- judging ---------------------------------------------------------------------------------------------------


def best_threshold(labels: np.ndarray, chances: np.ndarray) -> float:
    """The threshold among .05, .10, ... .95 with the highest macro-F1; the lowest of equals."""
    found = [f1_score(labels, chances > threshold, average="macro") for threshold in THRESHOLDS]
    return float(THRESHOLDS[int(np.argmax(found))])


def judge(split: Split, chances: Tensor) -> dict[str, float]:
    """
    Validation and test, with the threshold that is best on validation.

    Args:
        split ([`Split`]): the labels.
        chances (`torch.FloatTensor` of shape `(N,)`): of being an anomaly.

    Returns:
        `dict`: `threshold`, and for `validation` and `test` `..._auc` and `..._f1`.
    """
    found: dict[str, float] = {}
    for part, nodes in (("validation", split.validation), ("test", split.test)):
        labels, values = split.labels[nodes].numpy(), chances[nodes].double().numpy()
        if part == "validation":
            found["threshold"] = best_threshold(labels, values)
        found[f"{part}_auc"] = float(roc_auc_score(labels, values))
        found[f"{part}_f1"] = float(f1_score(labels, values > found["threshold"], average="macro"))
    return found


# ---- fitting ---------------------------------------------------------------------------------------------------


def make_network(model: str, settings: dict[str, Any], features: int, hidden: int) -> nn.Module:
    """
    A network with random weights.

    Args:
        model (`str`): one of `NETWORKS`.
        settings (`dict`): values as in `STAGES`.
        features (`int`): numbers that describe a node.
        hidden (`int`): width.
    """
    if model == ET:
        config = EnergyTransformerConfig(
            hidden_size=hidden,
            num_attention_heads=1,
            num_memories=2 * hidden,
            thinking_steps=settings["T"],
            step_size=settings["alpha"],
            attention_initializer_range=ATTENTION_SPREAD,
            num_node_features=features,
            num_labels=2,
        )
        return EnergyTransformerForNodeClassification(config)
    shape = {"in_channels": features, "hidden_channels": hidden, "num_layers": settings["layers"], "out_channels": 2}
    if model == "GCN":
        return GCN(**shape, dropout=settings["dropout"], cached=True)  # the same graph every time
    return GraphSAGE(**shape, dropout=settings["dropout"])


def logits_of(network: nn.Module, split: Split, **thinking: int) -> Tensor:
    """Scores `(N, 2)` of any network."""
    if isinstance(network, EnergyTransformerForNodeClassification):
        return network(split.features, split.edge_index, **thinking).logits
    return network(split.features, split.adjacency)


def fit_network(
    network: nn.Module, split: Split, rate: float, epochs: int, patience: int, random: bool
) -> dict[str, Any]:
    """
    Adam on the whole graph, one update an epoch; the network is left with its weights of the epoch that was best on
    validation.

    Args:
        network (`nn.Module`): gets fitted.
        split ([`Split`]): what to fit.
        rate (`float`): learning rate.
        epochs (`int`): at most so many.
        patience (`int`): ends when validation has not improved for so many epochs.
        random (`bool`): whether predictions in training differ from others (dropout); if they do not, those of the
            training pass are used.

    Returns:
        `dict`: `epoch` (the best), `epochs` (all), `seconds`.
    """
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    weights = torch.tensor([1.0, split.weight])
    targets, judged = split.labels[split.train], split.labels[split.validation].numpy()
    best, best_epoch, kept = -1.0, 0, copy.deepcopy(network.state_dict())
    started, epoch = time.perf_counter(), 0
    for epoch in range(epochs + 1):
        network.train()
        logits = logits_of(network, split)
        found = logits.detach()
        if random:
            network.eval()
            with torch.no_grad():
                found = logits_of(network, split)
        margin = (found[:, 1] - found[:, 0])[split.validation]
        auc = float(roc_auc_score(judged, margin.numpy()))
        if auc > best:
            best, best_epoch, kept = auc, epoch, copy.deepcopy(network.state_dict())
        if epoch == epochs or epoch - best_epoch >= patience:
            break
        optimizer.zero_grad()
        functional.cross_entropy(logits[split.train], targets, weight=weights).backward()
        optimizer.step()
    seconds = time.perf_counter() - started
    network.load_state_dict(kept)
    network.eval()
    return {"epoch": best_epoch, "epochs": epoch, "seconds": seconds}


def run_network(
    model: str, settings: dict[str, Any], split: Split, seed: int, hidden: int, epochs: int, patience: int
) -> tuple[dict[str, Any], Callable[..., Tensor]]:
    """
    Fits and judges a network.

    Args:
        model, settings, hidden: as in [`make_network`].
        split ([`Split`]): what to fit.
        seed (`int`): of the weights.
        epochs, patience: as in [`fit_network`].

    Returns:
        What was found, and a function that gives the chances of all nodes, for thinking options.
    """
    torch.manual_seed(seed)
    network = make_network(model, settings, split.features.shape[1], hidden)
    found = fit_network(network, split, settings["lr"], epochs, patience, settings.get("dropout", 0.0) > 0)

    @torch.no_grad()
    def chances(**thinking: int) -> Tensor:
        return logits_of(network, split, **thinking).softmax(-1)[:, 1]

    parameters = sum(parameter.numel() for parameter in network.parameters())
    return {**found, "parameters": parameters, **judge(split, chances())}, chances


def time_updates(settings: dict[str, dict[str, Any]], split: Split, hidden: int, turns: int = 5) -> dict[str, float]:
    """
    Seconds of one update of networks, which take turns, as the speed of a machine varies.

    Args:
        settings (`dict`): those of each network.
        split ([`Split`]): what to fit.
        hidden (`int`): width.
        turns (`int`, *optional*, defaults to 5): of each; one more goes before them, for warming up.

    Returns:
        `dict` of `float`: medians.
    """
    networks = {
        name: make_network(name, setting, split.features.shape[1], hidden) for name, setting in settings.items()
    }
    found: dict[str, list[float]] = {name: [] for name in networks}
    for turn in range(turns + 1):
        for name, network in networks.items():
            optimizer = torch.optim.Adam(network.parameters())
            started = time.perf_counter()
            functional.cross_entropy(logits_of(network, split)[split.train], split.labels[split.train]).backward()
            optimizer.step()
            if turn:
                found[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in found.items()}


def run_on_features(model: str, settings: dict[str, Any], split: Split, seed: int) -> dict[str, Any]:
    """
    Fits and judges a classifier that sees no edges.

    Args:
        model (`str`): `"gradient boosting"` or `"logistic regression"`.
        settings (`dict`): values as in `STAGES`.
        split ([`Split`]): what to fit.
        seed (`int`): of what is random in it.
    """
    classifier: Any
    if model == "gradient boosting":
        classifier = HistGradientBoostingClassifier(
            learning_rate=settings["lr"],
            min_samples_leaf=settings["leaf"],
            class_weight="balanced",
            early_stopping=False,
            random_state=seed,
        )
    else:
        classifier = LogisticRegression(C=settings["C"], class_weight="balanced", max_iter=2000)
    features, train = split.features.numpy(), split.train.numpy()
    started = time.perf_counter()
    classifier.fit(features[train], split.labels[split.train].numpy())
    seconds = time.perf_counter() - started
    chances = torch.from_numpy(classifier.predict_proba(features)[:, 1])
    return {"seconds": seconds, **judge(split, chances)}


__all__ = [
    "ATTENTION_SPREAD",
    "ET",
    "NETWORKS",
    "STAGES",
    "Graph",
    "Split",
    "best_threshold",
    "fit_network",
    "judge",
    "logits_of",
    "make_network",
    "run_network",
    "run_on_features",
    "time_updates",
]
