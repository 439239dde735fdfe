"""What evaluation with a Trainer says about energies: for its `compute_metrics`, and through `evaluate`'s modules."""

from typing import Any

import numpy as np
from torch import Tensor
from transformers import EvalPrediction

from ..configuration import EBTConfig
from ..metrics import metric_path


# `ignore_keys` that leaves the energies in: what is not ignored, EBTTrainer asks the model for
WITH_ENERGIES = [name for name in EBTConfig.keys_to_ignore_at_inference if name != "energies"]


def keep_energies(outputs: Any, labels: Tensor) -> Tensor:
    """
    For `preprocess_logits_for_metrics`: the energies alone, so that evaluation does not collect all the logits.

    Args:
        outputs (`tuple`): predictions and energies of a batch.
        labels (`Tensor`): its labels; not looked at.

    Returns:
        `Tensor` of shape `(B, S, K + 1)`, or `(B, K + 1)` of images.

    Raises:
        ValueError: if there are no energies, saying how to have them.

    Example:

    ```python
    >>> import torch
    >>> from ebt_transformers.training.compute_metrics import keep_energies

    >>> keep_energies((torch.zeros(2, 5, 32), torch.zeros(2, 5, 3)), torch.zeros(2, 5)).shape
    torch.Size([2, 5, 3])
    ```
    """
    if not isinstance(outputs, tuple) or len(outputs) != 2:
        raise ValueError(
            "The evaluation has no energies. Let EBTTrainer ask an energy-based model for them: "
            "`trainer.evaluate(ignore_keys=WITH_ENERGIES)`, or `trainer.train(ignore_keys_for_eval=WITH_ENERGIES)`."
        )
    return outputs[1]


def scored_energies(prediction: EvalPrediction) -> list[np.ndarray]:
    """
    Energies of the predictions that have a label, as the module `ebt_energy_gap` takes them.

    Args:
        prediction (`EvalPrediction`): energies `(N, S, K + 1)` and labels `(N, S)` of texts, or `(N, K + 1)` and the
            clean images.

    Returns:
        `list[np.ndarray]`: `(labelled positions, K + 1)` for every text that has some, `(K + 1,)` for every image.

    Raises:
        ValueError: if the predictions are no energies, or no position has a label.

    Example:

    ```python
    >>> import numpy as np
    >>> from transformers import EvalPrediction
    >>> from ebt_transformers.training.compute_metrics import scored_energies

    >>> labels = np.array([[5, 6, 7, -100]])  # the first token is not predicted, the last is padding
    >>> [array.shape for array in scored_energies(EvalPrediction(np.zeros((1, 4, 3)), labels))]
    [(2, 3)]
    ```
    """
    energies, labels = prediction.predictions, prediction.label_ids
    if not isinstance(energies, np.ndarray) or energies.ndim not in (2, 3):
        raise ValueError(
            "The predictions are no energies: give the trainer `preprocess_logits_for_metrics=keep_energies` too."
        )
    if energies.ndim == 2:
        return list(energies)
    # the prediction at a position is that of the next token
    rows = [row[:-1][label[1:] != -100] for row, label in zip(energies, labels, strict=True)]
    found = [row for row in rows if len(row)]
    if not found:
        raise ValueError("No position of the evaluation data has a label: there is no energy to average.")
    return found


def energy_compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """
    For `compute_metrics`: the mean energy of the evaluation data before thinking and after, and the gap between them.

    Args:
        prediction (`EvalPrediction`): see [`scored_energies`].

    Returns:
        `dict`: `energy_gap`, `initial_energy` and `final_energy`, by the `evaluate` module `ebt_energy_gap`. The
        trainer puts its prefix before them (`eval_energy_gap`).

    Raises:
        ImportError: without the extra `evaluate`.
        ValueError: see [`scored_energies`].

    Example:

    ```python
    >>> from ebt_transformers import EBTTrainer, EBTTrainingArguments
    >>> from ebt_transformers.training.compute_metrics import WITH_ENERGIES, energy_compute_metrics, keep_energies

    >>> trainer = EBTTrainer(
    ...     model,
    ...     EBTTrainingArguments("runs/first"),
    ...     eval_dataset=blocks,
    ...     compute_metrics=energy_compute_metrics,
    ...     preprocess_logits_for_metrics=keep_energies,
    ... )
    >>> trainer.evaluate(ignore_keys=WITH_ENERGIES)["eval_energy_gap"]
    ```
    """
    try:
        import evaluate
    except ImportError as error:
        raise ImportError("Metrics of energies need `pip install ebt-transformers[evaluate]`.") from error
    gap = evaluate.load(metric_path("ebt_energy_gap"), keep_in_memory=True)
    return gap.compute(predictions=scored_energies(prediction))


__all__ = ["WITH_ENERGIES", "energy_compute_metrics", "keep_energies", "scored_energies"]
