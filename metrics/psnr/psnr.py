"""Peak signal-to-noise ratio of images as an `evaluate` module; scikit-image computes it."""

from typing import Any

import datasets
import evaluate
import numpy as np
from skimage.metrics import peak_signal_noise_ratio


_DESCRIPTION = """
The peak signal-to-noise ratio (PSNR) of images in decibels: 10 log10(data_range ** 2 / mean squared error), over all
pixels and channels of an image. Higher is better; an image equal to its reference has infinity. Computed by
scikit-image.
"""

_CITATION = """
@article{scikit-image,
  title = {scikit-image: image processing in {P}ython},
  author = {van der Walt, St\\'efan and Sch\\"onberger, Johannes L. and Nunez-Iglesias, Juan and Boulogne,
            Fran\\c{c}ois and Warner, Joshua D. and Yager, Neil and Gouillart, Emmanuelle and Yu, Tony and the
            scikit-image contributors},
  journal = {PeerJ},
  volume = {2},
  pages = {e453},
  year = {2014},
  doi = {10.7717/peerj.453},
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` or array of images): what is judged. An image is anything numpy understands (an array, a PIL
        image, a tensor on the CPU, nested lists): grey `(height, width)`, or colour with the channels first or last.
        Images of one call may differ in size.
    references (`list` or array of images): the true images, each of the shape of its prediction.
    data_range (`float`, *optional*): distance between the smallest and the largest value a pixel may have. 255 if all
        images are uint8; needed for every other type (1.0 for floats of 0..1, 2.0 for -1..1).
    reduction (`str`, *optional*, defaults to `"mean"`): `"mean"`, the mean of the images' values (infinity as soon as
        one image equals its reference), or `"none"`, a list with the value of every image.

Returns:
    psnr (`float`, or `list` of `float` with `reduction="none"`): in decibels.

Raises:
    ValueError: for no images, another number of references than of predictions, an image that is not two- or
        three-dimensional, has another shape than its reference or values that are not finite, a missing or wrong
        `data_range`, and an unknown `reduction`.

Example:

```python
>>> import evaluate
>>> import numpy as np
>>> from ebt_transformers.metrics import metric_path

>>> psnr = evaluate.load(metric_path("psnr"))
>>> clean = np.zeros((2, 8, 8), dtype=np.uint8)
>>> result = psnr.compute(predictions=clean + np.uint8(5), references=clean, reduction="none")
>>> [round(value, 2) for value in result["psnr"]]
[34.15, 34.15]
>>> psnr.compute(predictions=clean / 255, references=clean / 255, data_range=1.0)
{'psnr': inf}
```
"""

# an image as it is: nested lists would lose the type of its values, and are slow
_IMAGE = {
    "values": datasets.Value("large_binary"),
    "dtype": datasets.Value("string"),
    "shape": datasets.Sequence(datasets.Value("int64")),
}


def _encode(image: Any) -> dict[str, Any]:
    array = np.asarray(image)
    if array.dtype.kind not in "uif" or array.ndim not in (2, 3) or array.size == 0:
        raise ValueError(
            "An image must hold numbers, as (height, width) or with channels; a batch must be a list of images, got "
            f"shape {array.shape} of {array.dtype}."
        )
    if not np.isfinite(array).all():
        raise ValueError("An image holds values that are not finite (NaN or infinity).")
    return {"values": array.tobytes(), "dtype": array.dtype.str, "shape": list(array.shape)}


def _encode_pair(prediction: Any, reference: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    pair = _encode(prediction), _encode(reference)
    shapes = [tuple(image["shape"]) for image in pair]
    if shapes[0] != shapes[1]:
        raise ValueError(f"A prediction has shape {shapes[0]}, its reference {shapes[1]}.")
    return pair


def _decode(image: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(image["values"], dtype=image["dtype"]).reshape(image["shape"])


def _range_of(prediction: np.ndarray, reference: np.ndarray, data_range: float | None) -> float:
    whole = [image.dtype == np.uint8 for image in (prediction, reference)]
    if data_range is None:
        if all(whole):
            return 255.0
        raise ValueError(
            f"Images of {prediction.dtype} and {reference.dtype} do not say how bright a pixel may be: give "
            "`data_range` (1.0 for 0..1, 2.0 for -1..1, 255 for 0..255)."
        )
    if not (np.isfinite(data_range) and data_range > 0):
        raise ValueError(f"`data_range` must be a positive number, got {data_range}.")
    if any(whole) and data_range != 255:
        raise ValueError(f"uint8 images have a `data_range` of 255, got {data_range}.")
    return float(data_range)


class PSNR(evaluate.Metric):
    """Peak signal-to-noise ratio; how it is called stands in its `inputs_description`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": _IMAGE, "references": _IMAGE}),
            reference_urls=["https://scikit-image.org/docs/stable/api/skimage.metrics.html"],
        )

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Adds one image and its reference."""
        encoded = _encode_pair(prediction, reference)
        super().add(prediction=encoded[0], reference=encoded[1], **kwargs)

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Adds images and their references."""
        if predictions is None or references is None or len(predictions) == 0 or len(references) == 0:
            raise ValueError("There are no images: `predictions` and `references` must hold at least one each.")
        if len(predictions) != len(references):
            raise ValueError(f"There are {len(predictions)} predictions and {len(references)} references.")
        pairs = [_encode_pair(*pair) for pair in zip(predictions, references, strict=True)]
        super().add_batch(predictions=[pair[0] for pair in pairs], references=[pair[1] for pair in pairs], **kwargs)

    def _compute(
        self,
        predictions: list[dict[str, Any]],
        references: list[dict[str, Any]],
        data_range: float | None = None,
        reduction: str = "mean",
    ) -> dict[str, float | list[float]]:
        if reduction not in ("mean", "none"):
            raise ValueError(f"`reduction` must be 'mean' or 'none', got {reduction!r}.")
        values = []
        for pair in zip(predictions, references, strict=True):
            prediction, reference = map(_decode, pair)
            of_range = _range_of(prediction, reference, data_range)
            with np.errstate(divide="ignore"):  # no error at all: infinity
                value = peak_signal_noise_ratio(
                    reference.astype(np.float64), prediction.astype(np.float64), data_range=of_range
                )
            values.append(float(value))
        return {"psnr": float(np.mean(values)) if reduction == "mean" else values}
