"""Laws of the image metrics: what scikit-image computes, for every kind of image, and an error for what is none."""

import inspect

import numpy as np
import pytest
import torch

from ebt_transformers.metrics import metric_path


evaluate = pytest.importorskip("evaluate")
skimage_metrics = pytest.importorskip("skimage.metrics")
NAMES = ("psnr", "ssim")


@pytest.fixture(scope="module")
def metrics(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    return {name: evaluate.load(metric_path(name), cache_dir=cache, keep_in_memory=True) for name in NAMES}


def images(*shapes: tuple[int, ...], dtype=np.uint8) -> tuple[list[np.ndarray], list[np.ndarray]]:
    random = np.random.default_rng(0)
    clean = [random.integers(0, 256, shape) for shape in shapes]
    noisy = [np.clip(image + random.integers(-30, 31, image.shape), 0, 255) for image in clean]
    return [image.astype(dtype) for image in noisy], [image.astype(dtype) for image in clean]


def expected(name: str, prediction: np.ndarray, reference: np.ndarray, data_range: float, channel_axis=None) -> float:
    if name == "psnr":
        return skimage_metrics.peak_signal_noise_ratio(reference, prediction, data_range=data_range)
    published = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return skimage_metrics.structural_similarity(
        reference, prediction, data_range=data_range, channel_axis=channel_axis, **published
    )


def test_paths_are_folders_and_an_unknown_name_lists_the_known():
    assert metric_path("psnr").endswith("psnr")
    with pytest.raises(ValueError, match="'pnsr'.*psnr, ssim"):
        metric_path("pnsr")


@pytest.mark.parametrize("name", NAMES)
def test_it_is_documented(metrics, name):
    info = metrics[name].info
    assert all(len(text.strip()) > 50 for text in (info.description, info.citation, info.inputs_description))
    assert "data_range" in inspect.getdoc(metrics[name].compute)


@pytest.mark.parametrize("name", NAMES)
def test_grey_and_colour_images_of_unequal_size(metrics, name):
    noisy, clean = images((12, 17), (20, 11, 3), (16, 16, 1), (11, 30))
    axes = [None, -1, -1, None]
    each = [expected(name, *pair, 255, axis) for *pair, axis in zip(noisy, clean, axes, strict=True)]
    found = metrics[name].compute(predictions=noisy, references=clean, reduction="none")[name]
    np.testing.assert_allclose(found, each, rtol=1e-12)
    mean = metrics[name].compute(predictions=noisy, references=clean)[name]
    assert isinstance(mean, float) and mean == pytest.approx(np.mean(each))


@pytest.mark.parametrize("name", NAMES)
def test_floats_arrays_and_tensors(metrics, name):
    noisy, clean = images((4, 12, 12, 3), dtype=np.float32)
    pair = {"predictions": noisy[0], "references": clean[0]}
    of_bytes = metrics[name].compute(**{key: value.astype(np.uint8) for key, value in pair.items()})[name]
    assert metrics[name].compute(**pair, data_range=255)[name] == pytest.approx(of_bytes)
    scaled = {key: torch.from_numpy(value / 127.5 - 1) for key, value in pair.items()}
    if name == "psnr":  # the constants of SSIM count from zero, which a shift moves
        assert metrics[name].compute(**scaled, data_range=2)[name] == pytest.approx(of_bytes, rel=1e-5)
    lists = {key: (value / 255).tolist() for key, value in pair.items()}
    assert metrics[name].compute(**lists, data_range=1.0)[name] == pytest.approx(of_bytes, rel=1e-5)


def test_channels_first(metrics):
    noisy, clean = images((3, 12, 15))
    last = [[np.moveaxis(image, 0, -1) for image in side] for side in (noisy, clean)]
    by_axis = metrics["ssim"].compute(predictions=noisy, references=clean, channel_axis=0)
    assert by_axis["ssim"] == pytest.approx(metrics["ssim"].compute(predictions=last[0], references=last[1])["ssim"])
    # channels taken for columns do not fit the window
    with pytest.raises(ValueError, match="channel_axis"):
        metrics["ssim"].compute(predictions=noisy, references=clean)


def test_windows(metrics):
    noisy, clean = images((9, 9))
    found = metrics["ssim"].compute(predictions=noisy, references=clean, window="uniform")["ssim"]
    assert found == pytest.approx(skimage_metrics.structural_similarity(clean[0], noisy[0], data_range=255))
    with pytest.raises(ValueError, match="11 x 11.*9 x 9"):
        metrics["ssim"].compute(predictions=noisy, references=clean)


@pytest.mark.filterwarnings("error")
def test_identical_images(metrics):
    _, clean = images((12, 12), (12, 12))
    other = [clean[0], clean[1] ^ 1]
    assert metrics["psnr"].compute(predictions=clean, references=clean) == {"psnr": float("inf")}
    each = metrics["psnr"].compute(predictions=other, references=clean, reduction="none")["psnr"]
    assert each[0] == float("inf") and each[1] == pytest.approx(10 * np.log10(255**2))
    assert metrics["ssim"].compute(predictions=clean, references=clean) == {"ssim": pytest.approx(1.0)}


@pytest.mark.parametrize("name", NAMES)
def test_added_one_by_one_and_in_batches(metrics, name, tmp_path):
    noisy, clean = images((12, 12), (14, 12, 3), (11, 11))
    whole = metrics[name].compute(predictions=noisy, references=clean, reduction="none")
    for metric in (metrics[name], evaluate.load(metric_path(name), cache_dir=str(tmp_path))):  # in memory, on disk
        metric.add(prediction=noisy[0], reference=clean[0])
        metric.add_batch(predictions=noisy[1:], references=clean[1:])
        assert metric.compute(reduction="none") == whole


def test_combined(tmp_path):
    noisy, clean = images((12, 12))
    both = evaluate.combine([evaluate.load(metric_path(name), cache_dir=str(tmp_path)) for name in NAMES])
    assert set(both.compute(predictions=noisy, references=clean, data_range=255)) == {"psnr", "ssim"}


GREY = np.zeros((12, 12), np.uint8)
MISTAKES = {
    "empty": ({"predictions": [], "references": []}, "no images"),
    "missing": ({"predictions": [GREY]}, "no images"),
    "counts": ({"predictions": [GREY] * 2, "references": [GREY]}, "2 predictions and 1 references"),
    "shapes": ({"predictions": [GREY], "references": [GREY[:, :11]]}, r"\(12, 12\).*\(12, 11\)"),
    "not a list": ({"predictions": GREY, "references": GREY}, "list of images"),
    "a batch too many": ({"predictions": [[[GREY]]], "references": [[[GREY]]]}, "list of images"),
    "no pixels": ({"predictions": [GREY[:0]], "references": [GREY[:0]]}, "list of images"),
    "masks": ({"predictions": [GREY > 1], "references": [GREY > 1]}, "bool"),
    "not finite": ({"predictions": [GREY + np.nan], "references": [GREY]}, "finite"),
    "floats": ({"predictions": [GREY / 255], "references": [GREY / 255]}, "data_range.*1.0"),
    "mixed": ({"predictions": [GREY / 255], "references": [GREY]}, "data_range"),
    "mixed range": ({"predictions": [GREY / 255], "references": [GREY], "data_range": 1.0}, "uint8.*255"),
    "no range": ({"predictions": [GREY / 255], "references": [GREY / 255], "data_range": 0.0}, "positive"),
    "reduction": ({"predictions": [GREY], "references": [GREY], "reduction": "sum"}, "'sum'"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_mistakes_are_named_and_leave_the_metric_usable(name, mistake, tmp_path):
    # on disk evaluate would wait a second for the lock that the failed call left behind
    metric = evaluate.load(metric_path(name), cache_dir=str(tmp_path), keep_in_memory=True)
    options, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        metric.compute(**options)
    assert metric.compute(predictions=[GREY], references=[GREY])[name] > 0.99


@pytest.mark.parametrize("options", [{"window": "hann"}, {"channel_axis": 3}])
def test_options_of_ssim(metrics, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        metrics["ssim"].compute(predictions=[GREY], references=[GREY], **options)


def test_what_both_share_is_the_same_in_both():
    """Each file stands alone, so that `evaluate` can load it; what they have in common may not drift apart."""
    modules = [inspect.getmodule(type(evaluate.load(metric_path(name)))) for name in NAMES]
    for helper in ("_encode", "_encode_pair", "_decode", "_range_of"):
        assert len({inspect.getsource(getattr(module, helper)) for module in modules}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_examples_in_their_descriptions_run(name, tmp_path):
    import doctest

    text = evaluate.load(metric_path(name), cache_dir=str(tmp_path)).info.inputs_description
    lines = "\n".join("" if line.startswith("```") else line for line in text.splitlines())
    test = doctest.DocTestParser().get_doctest(lines, {}, name, None, None)
    assert test.examples and doctest.DocTestRunner().run(test).failed == 0
