"""From probabilities to decisions about anomalies: the threshold, and how good decisions and ranking are."""

from typing import Any

import numpy as np


# the values that a threshold is chosen from, as in Tang et al. 2022
THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))
UNKNOWN = -100  # the label of nodes that do not count


def macro_f1(labels: Any, scores: Any, threshold: float) -> float:
    """
    The mean of the F1 scores of both classes, where a node is anomalous if its score is above the threshold. It is
    scikit-learn's `f1_score(..., average="macro")`, counted here because it is needed many times.

    Args:
        labels (array-like of shape `(n,)`): 1 for anomalies, 0 for others.
        scores (array-like of shape `(n,)`): probability of an anomaly.
        threshold (`float`): of the scores.

    Returns:
        `float` from 0 to 1.

    Example:

    ```python
    >>> from ebt_transformers.training.thresholds import macro_f1

    >>> macro_f1([0, 0, 1, 1], [0.1, 0.6, 0.4, 0.9], threshold=0.5)
    0.5
    ```
    """
    anomalous, found = np.asarray(labels) == 1, np.asarray(scores) > threshold
    hits = int((anomalous & found).sum())
    rest = int((~anomalous & ~found).sum())
    wrong = len(anomalous) - hits - rest
    each = [2 * right / (2 * right + wrong) if right + wrong else 0.0 for right in (hits, rest)]
    return sum(each) / 2


def choose_threshold(labels: Any, scores: Any) -> float:
    """
    Of 0.05, 0.10, ..., 0.95 the threshold with the highest macro-F1; of equals the one nearest to 0.5.

    Args:
        labels (array-like of shape `(n,)`): 1 for anomalies, 0 for others; of validation, never of test.
        scores (array-like of shape `(n,)`): probability of an anomaly.

    Returns:
        `float`.
    """
    return max(THRESHOLDS, key=lambda value: (macro_f1(labels, scores, value), -abs(value - 0.5)))


def auc(labels: Any, scores: Any) -> float:
    """
    The probability that an anomaly has a higher score than another node (area under the ROC curve).

    Args:
        labels (array-like of shape `(n,)`): 1 for anomalies, 0 for others; both are needed.
        scores (array-like of shape `(n,)`): probability of an anomaly.

    Raises:
        ValueError: if there are no anomalies, or nothing else.
        ImportError: if scikit-learn is missing.
    """
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError as error:
        raise ImportError("The AUC needs scikit-learn: pip install 'ebt-transformers[evaluate]'.") from error
    if len(np.unique(np.asarray(labels))) != 2:
        raise ValueError("The AUC needs anomalies and other nodes among those that are scored.")
    return float(roc_auc_score(labels, scores))


class AnomalyMetrics:
    """
    For a Trainer's `compute_metrics`: macro-F1 at a threshold, and AUC.

    Args:
        threshold (`float`, *optional*): the one to use, chosen before. `None` chooses it on what is evaluated, which
            is right for validation only.

    Example:

    ```python
    >>> import numpy as np
    >>> from transformers import EvalPrediction
    >>> from ebt_transformers.training.thresholds import AnomalyMetrics

    >>> logits, labels = np.array([[[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]]]), np.array([[0, 1, -100]])
    >>> AnomalyMetrics(threshold=0.5)(EvalPrediction(logits, labels))
    {'macro_f1': 1.0, 'auc': 1.0, 'threshold': 0.5}
    ```
    """

    def __init__(self, threshold: float | None = None) -> None:
        self.threshold = threshold

    def __call__(self, prediction: Any) -> dict[str, float]:
        """
        Args:
            prediction (`EvalPrediction`): logits `(..., 2)` and labels `(...)`, -100 for nodes that do not count.

        Returns:
            `dict` with `macro_f1`, `auc` and `threshold`.
        """
        labels, scores = scored_nodes(prediction)
        threshold = choose_threshold(labels, scores) if self.threshold is None else self.threshold
        return {"macro_f1": macro_f1(labels, scores, threshold), "auc": auc(labels, scores), "threshold": threshold}


def scored_nodes(prediction: Any) -> tuple[np.ndarray, np.ndarray]:
    """
    Labels and probabilities of an anomaly of the nodes that count.

    Args:
        prediction (`EvalPrediction`): logits `(..., 2)` and labels `(...)`.

    Returns:
        Two `np.ndarray` of shape `(n,)`.
    """
    logits, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    logits = logits.reshape(-1, logits.shape[-1]).astype(np.float64)
    labels = labels.reshape(-1)
    counts = labels != UNKNOWN
    # the probability of the second of two classes
    return labels[counts], 1.0 / (1.0 + np.exp(np.clip(logits[counts, 0] - logits[counts, 1], -500, 500)))


def accuracy(prediction: Any) -> dict[str, float]:
    """
    For a Trainer's `compute_metrics`: the share of graphs whose most likely class is theirs.

    Args:
        prediction (`EvalPrediction`): logits `(G, L)` and labels `(G,)`.

    Returns:
        `dict` with `accuracy`.
    """
    found = np.asarray(prediction.predictions).argmax(-1)
    return {"accuracy": float((found == np.asarray(prediction.label_ids)).mean())}


__all__ = ["THRESHOLDS", "AnomalyMetrics", "accuracy", "auc", "choose_threshold", "macro_f1", "scored_nodes"]
