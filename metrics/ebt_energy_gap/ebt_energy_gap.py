"""
How far thinking lowers the energy, as an `evaluate` module.

Energies that are already there need numpy alone. For texts it imports the package, as ebt_perplexity does and for the
same reasons.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np


_DESCRIPTION = """
The energy gap of predictions found by descending an energy: the mean energy before the first thinking step less that
after the last. Positive when thinking lowers the energy. Energies are on each model's own scale: compare data, or
numbers of steps, of one model. The landscapes of a model have no common scale either: where the last step is on
another one than the first, the gap may be negative although every step lowers the energy on its own landscape.
"""

_CITATION = """
@article{gladstone2025energybased,
  title = {Energy-Based Transformers are Scalable Learners and Thinkers},
  author = {Gladstone, Alexi and Nanduru, Ganesh and Islam, Md Mofijul and Han, Peixuan and Ha, Hyeonjeong and
            Chadha, Aman and Du, Yilun and Ji, Heng and Li, Jundong and Iqbal, Tariq},
  journal = {arXiv preprint arXiv:2507.02092},
  year = {2025},
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list`): of every example either its energies, an array `(..., K + 1)` with those before each of `K`
        steps and after the last on the last axis (`output.energies[row]` of a model of text or images), or a text, of
        which the energies are computed. Examples of one call may differ in shape.
    model (`str`, `Path` or `PreTrainedModel`, *optional*): for texts: a folder, a Hub id, or the model itself.
    tokenizer (`str`, `Path` or tokenizer, *optional*): needed with a model given as itself.
    device, trust_remote_code, batch_size, add_start_token, max_length (*optional*): for texts, as in ebt_perplexity.
    thinking_...: for texts, options of thinking as in `ThinkingConfig`, such as `thinking_steps=4`.
    reduction (`str`, *optional*, defaults to `"mean"`): `"mean"`, over all positions of all examples, or `"none"`, a
        list with the value of every example.

    All but the predictions may also be given once for all, to `evaluate.load`; those of a call win.

Returns:
    energy_gap (`float`, or `list` of `float` with `reduction="none"`): energy before the first step less energy after
        the last.
    initial_energy, final_energy: the two, in the same form.

Raises:
    ValueError: for no predictions, energies that are not finite or of fewer than 2 on the last axis, texts without a
        model, options without texts, and options that are unknown or out of range.
    TypeError: for a model without energies.

Example:

```python
>>> import evaluate
>>> import numpy as np
>>> from ebt_transformers.assets import checkpoint_path
>>> from ebt_transformers.metrics import metric_path

>>> gap = evaluate.load(metric_path("ebt_energy_gap"))
>>> gap.compute(predictions=[np.array([[3.0, 2.0, 1.5], [1.0, 1.0, 0.5]])])
{'energy_gap': 1.0, 'initial_energy': 2.0, 'final_energy': 1.0}
>>> texts = ["What light through yonder window breaks?"]
>>> found = gap.compute(predictions=texts, model=str(checkpoint_path()), thinking_landscapes=[0, 0, 0])
>>> found["energy_gap"] > 0
True
```
"""

# energies as they are, of any shape; or a text, without a shape (evaluate cannot store None for a string)
_EXAMPLE = {
    "energies": datasets.Value("large_binary"),
    "shape": datasets.Sequence(datasets.Value("int64")),
    "text": datasets.Value("string"),
}
_LOADING = {"model": None, "tokenizer": None, "device": None, "trust_remote_code": False}
_OPTIONS = {*_LOADING, "batch_size", "add_start_token", "max_length", "reduction"}


def _encode(example: Any) -> dict[str, Any]:
    if isinstance(example, str):
        return {"energies": b"", "shape": [], "text": example}
    array = np.asarray(example)
    if array.dtype.kind not in "uif" or array.ndim < 1 or array.size == 0 or array.shape[-1] < 2:
        raise ValueError(
            "Energies must be numbers, those before every step and after the last on the last axis (at least 2), got "
            f"shape {array.shape} of {array.dtype}."
        )
    if not np.isfinite(array).all():
        raise ValueError("Energies hold values that are not finite (NaN or infinity).")
    return {"energies": array.astype(np.float64).tobytes(), "shape": list(array.shape), "text": ""}


def _decode(example: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(example["energies"], dtype=np.float64).reshape(example["shape"])


def _energies_of_texts(texts: list[str], options: dict[str, Any]) -> list[np.ndarray]:
    try:
        from ebt_transformers.pipelines.text_scores import load_text_model, text_energies
    except ImportError as error:
        raise ImportError("Energies of texts need the package: `pip install ebt-transformers`.") from error
    options = dict(options)
    loading = {name: options.pop(name, default) for name, default in _LOADING.items()}
    thinking = {name: options.pop(name) for name in list(options) if name.startswith("thinking_")}
    return text_energies(*load_text_model(**loading), texts, thinking=thinking, **options)


class EnergyGap(evaluate.Metric):
    """Energy before thinking less energy after; how it is called stands in its `inputs_description`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        own = {name: kwargs.pop(name) for name in list(kwargs) if name in _OPTIONS or name.startswith("thinking_")}
        super().__init__(*args, **kwargs)
        self.options = own

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": _EXAMPLE}),
            reference_urls=["https://arxiv.org/abs/2507.02092"],
        )

    def add(self, *, prediction: Any = None, **kwargs: Any) -> None:
        """Adds one example."""
        super().add(prediction=_encode(prediction), **kwargs)

    def add_batch(self, *, predictions: Any = None, **kwargs: Any) -> None:
        """Adds examples."""
        if predictions is None or isinstance(predictions, str) or len(predictions) == 0:
            raise ValueError(f"`predictions` must be a list of at least one example, got {predictions!r}.")
        super().add_batch(predictions=[_encode(example) for example in predictions], **kwargs)

    def _compute(self, predictions: list[dict[str, Any]], **kwargs: Any) -> dict[str, float | list[float]]:
        options = {**self.options, **kwargs}
        unknown = sorted(name for name in options if name not in _OPTIONS and not name.startswith("thinking_"))
        if unknown:
            raise ValueError(f"Unknown option(s) {', '.join(unknown)}. Allowed: {', '.join(sorted(_OPTIONS))}.")
        reduction = options.pop("reduction", "mean")
        if reduction not in ("mean", "none"):
            raise ValueError(f"`reduction` must be 'mean' or 'none', got {reduction!r}.")
        texts = [example["text"] for example in predictions if not example["shape"]]
        if len(texts) == len(predictions):
            arrays = _energies_of_texts(texts, options)
        elif texts:
            raise ValueError("Some predictions are energies, others texts: give either.")
        elif kwargs.keys() - {"reduction"}:
            raise ValueError(f"Option(s) {', '.join(sorted(kwargs))} are for texts; the predictions are energies.")
        else:
            arrays = [_decode(example) for example in predictions]
        return _gaps(arrays, reduction)


def _gaps(arrays: Sequence[np.ndarray], reduction: str) -> dict[str, float | list[float]]:
    initial, final = ([array[..., step].ravel() for array in arrays] for step in (0, -1))
    if reduction == "mean":
        initial, final = [np.concatenate(initial)], [np.concatenate(final)]
    before, after = ([float(values.mean(dtype=np.float64)) for values in side] for side in (initial, final))
    found = {
        "energy_gap": [first - last for first, last in zip(before, after, strict=True)],
        "initial_energy": before,
        "final_energy": after,
    }
    return {name: values[0] if reduction == "mean" else values for name, values in found.items()}
