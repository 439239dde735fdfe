"""Structural similarity of images as an `evaluate` module; scikit-image computes it."""

from typing import Any

import datasets
import evaluate
import numpy as np
from skimage.metrics import structural_similarity


_DESCRIPTION = """
The structural similarity (SSIM) of images: how well local means, contrasts and patterns agree, from -1 to 1, the mean
over an image's windows and channels. Higher is better; an image equal to its reference has 1. Computed by
scikit-image.
"""

_CITATION = """
@article{ssim,
  title = {Image quality assessment: from error visibility to structural similarity},
  author = {Wang, Zhou and Bovik, Alan C. and Sheikh, Hamid R. and Simoncelli, Eero P.},
  journal = {IEEE Transactions on Image Processing},
  volume = {13},
  number = {4},
  pages = {600--612},
  year = {2004},
  doi = {10.1109/TIP.2003.819861},
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` or array of images): what is judged. An image is anything numpy understands (an array, a PIL
        image, a tensor on the CPU, nested lists): grey `(height, width)`, or colour `(height, width, channels)`.
        Images of one call may differ in size.
    references (`list` or array of images): the true images, each of the shape of its prediction.
    data_range (`float`, *optional*): distance between the smallest and the largest value a pixel may have. 255 if all
        images are uint8; needed for every other type (1.0 for floats of 0..1, 2.0 for -1..1).
    reduction (`str`, *optional*, defaults to `"mean"`): `"mean"`, the mean of the images' values, or `"none"`, a list
        with the value of every image.
    channel_axis (`int`, *optional*, defaults to -1): the axis of the channels of colour images; 0 for
        `(channels, height, width)`. Grey images have none.
    window (`str`, *optional*, defaults to `"gaussian"`): `"gaussian"`, 11 pixels wide with a standard deviation of 1.5
        and population variances, as published, or `"uniform"`, 7 pixels wide with sample variances, scikit-image's
        own default.

Returns:
    ssim (`float`, or `list` of `float` with `reduction="none"`): from -1 to 1.

Raises:
    ValueError: for no images, another number of references than of predictions, an image that is not two- or
        three-dimensional, is smaller than the window, has another shape than its reference or values that are not
        finite, a missing or wrong `data_range`, and an unknown `reduction`, `channel_axis` or `window`.

Example:

```python
>>> import evaluate
>>> import numpy as np
>>> from ebt_transformers.metrics import metric_path

>>> ssim = evaluate.load(metric_path("ssim"))
>>> clean = np.arange(16 * 16, dtype=np.uint8).reshape(16, 16)
>>> ssim.compute(predictions=[clean], references=[clean])
{'ssim': 1.0}
>>> ssim.compute(predictions=[255 - clean], references=[clean])["ssim"] < 0
True
```
"""

# the window's side in pixels, and its options for scikit-image
_WINDOWS: dict[str, tuple[int, dict[str, Any]]] = {
    "gaussian": (11, {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}),
    "uniform": (7, {"win_size": 7}),
}

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


class SSIM(evaluate.Metric):
    """Structural similarity; how it is called stands in its `inputs_description`."""

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
        channel_axis: int = -1,
        window: str = "gaussian",
    ) -> dict[str, float | list[float]]:
        if reduction not in ("mean", "none"):
            raise ValueError(f"`reduction` must be 'mean' or 'none', got {reduction!r}.")
        if window not in _WINDOWS:
            raise ValueError(f"`window` must be one of {', '.join(_WINDOWS)}, got {window!r}.")
        if not -3 <= channel_axis < 3:
            raise ValueError(f"`channel_axis` must be an axis of a colour image, -3 to 2, got {channel_axis}.")
        side, options = _WINDOWS[window]
        values = []
        for pair in zip(predictions, references, strict=True):
            prediction, reference = map(_decode, pair)
            of_range = _range_of(prediction, reference, data_range)
            channels = None if prediction.ndim == 2 else channel_axis % 3
            sides = [length for axis, length in enumerate(prediction.shape) if axis != channels]
            if min(sides) < side:
                raise ValueError(
                    f"The {window} window needs at least {side} x {side} pixels, got {sides[0]} x {sides[1]} "
                    f"(shape {prediction.shape}; is `channel_axis` the channels?)."
                )
            value = structural_similarity(
                reference.astype(np.float64),
                prediction.astype(np.float64),
                data_range=of_range,
                channel_axis=channels,
                **options,
            )
            values.append(float(value))
        return {"ssim": float(np.mean(values)) if reduction == "mean" else values}
