"""How well energies tell what is out of distribution, as an `evaluate` module; scikit-learn computes it."""

from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import roc_auc_score


_DESCRIPTION = """
The area under the receiver operating characteristic of energies as a detector of what is out of distribution: the
probability that an example out of distribution has a higher energy than one in it (ties count half). 1 is perfect, 0.5
is guessing, and below 0.5 the energy points the wrong way. Computed by scikit-learn.
"""

_CITATION = """
@article{scikit-learn,
  title = {Scikit-learn: Machine Learning in {P}ython},
  author = {Pedregosa, F. and Varoquaux, G. and Gramfort, A. and Michel, V. and Thirion, B. and Grisel, O. and
            Blondel, M. and Prettenhofer, P. and Weiss, R. and Dubourg, V. and Vanderplas, J. and Passos, A. and
            Cournapeau, D. and Brucher, M. and Perrot, M. and Duchesnay, E.},
  journal = {Journal of Machine Learning Research},
  volume = {12},
  pages = {2825--2830},
  year = {2011},
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` or array of `float`): the energy of every example, of a text for instance its mean over tokens.
    references (`list` or array of `int`): 1 for examples out of distribution, 0 for those in it.

Returns:
    energy_auroc (`float`): from 0 to 1.

Raises:
    ValueError: for another number of references than of predictions, energies that are not finite, references other
        than 0 and 1, and only one of the two.

Example:

```python
>>> import evaluate
>>> from ebt_transformers.metrics import metric_path

>>> auroc = evaluate.load(metric_path("ebt_energy_auroc"))
>>> auroc.compute(predictions=[-3.0, -2.0, -2.5, 1.0], references=[0, 0, 1, 1])
{'energy_auroc': 0.75}
```
"""


def _numbers(values: Any, name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "uifb" or array.size == 0:
        raise ValueError(f"`{name}` must be a list of at least one number, got shape {array.shape} of {array.dtype}.")
    if not np.isfinite(array).all():
        raise ValueError(f"`{name}` hold values that are not finite (NaN or infinity).")
    return array.astype(np.float64)


class EnergyAUROC(evaluate.Metric):
    """Area under the ROC of energies; how it is called stands in its `inputs_description`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
            reference_urls=["https://scikit-learn.org/stable/modules/generated/sklearn.metrics.roc_auc_score.html"],
        )

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Adds one energy and whether its example is out of distribution."""
        self.add_batch(predictions=[prediction], references=[reference], **kwargs)

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Adds energies and whether their examples are out of distribution."""
        energies, labels = _numbers(predictions, "predictions"), _numbers(references, "references")
        if len(energies) != len(labels):
            raise ValueError(f"There are {len(energies)} predictions and {len(labels)} references.")
        if not np.isin(labels, (0, 1)).all():
            wrong = labels[~np.isin(labels, (0, 1))][0]
            raise ValueError(f"`references` must be 0 (in distribution) or 1 (out of it), got {wrong:g}.")
        super().add_batch(predictions=energies.tolist(), references=labels.astype(int).tolist(), **kwargs)

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, float]:
        if len(set(references)) < 2:
            which = "out of" if references[0] else "in"
            raise ValueError(f"All {len(references)} examples are {which} distribution: both kinds are needed.")
        return {"energy_auroc": float(roc_auc_score(references, predictions))}
