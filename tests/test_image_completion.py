"""Laws of `pipeline("image-completion")`: visible patches stay, masks mean what they say, batches change nothing."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

from ebt_transformers import (
    EBTConfig,
    EBTForCausalLM,
    EBTForImageDenoising,
    EBTImageConfig,
    EBTImageProcessor,
    EnergyTransformerConfig,
    EnergyTransformerForImageCompletion,
    ImageCompletionPipeline,
)
from ebt_transformers.assets import completion_checkpoint_path, example_picture_path
from ebt_transformers.pipelines import plot_completion
from ebt_transformers.pipelines.patch_masks import random_patches


SMALL: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
    "attention_initializer_range": 0.3,
    "thinking_steps": 3,
}
RNG = np.random.default_rng(0)
PICTURES = [RNG.integers(0, 256, (*size, 3), dtype=np.uint8) for size in [(16, 16), (18, 30), (7, 9), (40, 12)]]
PICTURE = PICTURES[0]
CORNER = np.zeros((4, 4), dtype=bool)
CORNER[1, 2] = CORNER[3, 3] = True


def make_model(**overrides: Any) -> EnergyTransformerForImageCompletion:
    """A tiny random model whose thinking moves pictures."""
    torch.manual_seed(1)
    return EnergyTransformerForImageCompletion(EnergyTransformerConfig.for_images(**{**SMALL, **overrides})).eval()


def make(model: Any = None, **options: Any) -> ImageCompletionPipeline:
    return pipeline("image-completion", model=make_model() if model is None else model, device="cpu", **options)


@pytest.fixture(scope="module")
def completer() -> ImageCompletionPipeline:
    return make()


def in_pixels(mask: np.ndarray, patch: int = 4) -> np.ndarray:
    return np.kron(mask, np.ones((patch, patch), dtype=bool)).astype(bool)


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Two results with tensors, equal but for the last digits."""
    assert found.keys() == expected.keys() and torch.equal(found["mask"], expected["mask"])
    for name in ("image", "masked_image", "original"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["energies"], expected["energies"], rtol=1e-4)


# ---- what is returned ------------------------------------------------------------------------------------------


def test_visible_patches_stay_and_the_others_are_the_model_s(completer: ImageCompletionPipeline) -> None:
    found = completer(PICTURE, mask=CORNER, output_type="pt", output_energies=True, output_trajectory=True)
    pixels = torch.from_numpy(PICTURE).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        expected = completer.model(
            pixels.float(),
            bool_masked_pos=torch.from_numpy(CORNER).view(1, -1),
            output_energies=True,
            output_trajectory=True,
        )
    hidden = torch.from_numpy(in_pixels(CORNER))
    decoded = ((expected.reconstruction[0] + 1) / 2).clamp(0, 1)
    torch.testing.assert_close(found["image"], torch.where(hidden, decoded, (pixels[0] + 1).float() / 2))
    assert found["energies"] == pytest.approx(expected.energies[0, 0].tolist()) and found["steps_taken"] == 3
    assert torch.equal(found["mask"], torch.from_numpy(CORNER))
    assert len(found["trajectory"]) == 4 and torch.equal(found["trajectory"][-1], found["image"])
    assert not torch.equal(found["trajectory"][0], found["image"])
    whole = completer(PICTURE, mask=CORNER, output_type="pt", paste_visible=False)["image"]
    torch.testing.assert_close(whole, decoded)
    shown = completer(PICTURE, mask=CORNER)
    assert shown.keys() == {"image", "masked_image", "original", "mask"}
    assert np.array_equal(np.array(shown["original"]), PICTURE)
    for name in ("image", "masked_image"):
        assert np.array_equal(np.array(shown[name])[~in_pixels(CORNER)], PICTURE[~in_pixels(CORNER)])
    assert (np.abs(np.array(shown["masked_image"])[in_pixels(CORNER)].astype(int) - 127) <= 1).all()


def test_output_types_are_the_same_picture(completer: ImageCompletionPipeline) -> None:
    found = {kind: completer(PICTURE, output_type=kind) for kind in ("pil", "np", "pt")}
    assert isinstance(found["pil"]["image"], Image.Image) and isinstance(found["np"]["mask"], np.ndarray)
    assert np.array_equal(found["np"]["image"], found["pt"]["image"].permute(1, 2, 0).numpy())
    assert np.abs(np.array(found["pil"]["image"]) / 255 - found["np"]["image"]).max() < 0.51 / 255


def test_several_blocks_have_energies_each() -> None:
    found = make(make_model(num_blocks=2))(PICTURE, thinking_steps=4, output_energies=True, output_trajectory=True)
    assert [len(energies) for energies in found["energies"]] == [5, 5] and found["steps_taken"] == [4, 4]
    assert len(found["trajectory"]) == 9
    assert len(plot_completion(found).axes) == 8


def test_thinking_options_are_the_call_s_over_the_construction_s() -> None:
    completer = make(thinking_steps=2)
    assert len(completer(PICTURE, output_energies=True)["energies"]) == 3
    longer = completer(PICTURE, thinking_steps=5, thinking_tolerance=1e9, output_energies=True)
    assert len(longer["energies"]) <= 6 and longer["steps_taken"] < 5  # such a tolerance ends it at once
    with pytest.raises(ValueError, match="thinking_candidates means nothing to an Energy Transformer"):
        completer(PICTURE, thinking_candidates=2)


# ---- pictures --------------------------------------------------------------------------------------------------


def test_every_kind_of_picture_gives_the_same(completer: ImageCompletionPipeline, tmp_path: Path) -> None:
    Image.fromarray(PICTURE).save(tmp_path / "picture.png")
    kinds = [
        Image.fromarray(PICTURE),
        str(tmp_path / "picture.png"),
        tmp_path / "picture.png",
        PICTURE.transpose(2, 0, 1),
        torch.from_numpy(PICTURE),
        PICTURE / 255,
        {"image": PICTURE, "label": 3},
    ]
    options = {"output_type": "pt", "output_energies": True}
    expected = completer(PICTURE, **options)
    for kind in kinds:
        same(completer(kind, **options), expected)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_batch_is_its_pictures_and_keeps_their_order(completer: ImageCompletionPipeline, batch_size: int) -> None:
    options: dict[str, Any] = {"output_type": "pt", "output_energies": True, "mask_ratio": 0.3}
    alone = [completer(picture, **options) for picture in PICTURES]
    options["batch_size"] = batch_size
    rows = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(picture) for picture in PICTURES]},
        features=datasets.Features({"image": datasets.Image()}),
    )

    def one_by_one() -> Iterator[np.ndarray]:
        yield from PICTURES

    assert isinstance(completer(PICTURES, **options), list)
    for pictures in (PICTURES, rows, KeyDataset(rows, "image"), one_by_one()):
        results = list(completer(pictures, **options))
        assert len(results) == len(PICTURES)
        for found, expected in zip(results, alone, strict=True):
            same(found, expected)
    stacked = completer(np.stack([PICTURE, PICTURE]), **options)
    assert len(stacked) == 2
    same(stacked[1], alone[0])


def test_pictures_are_resized_to_cover_the_model_s_size_and_cut() -> None:
    completer = make(make_model(image_size=[8, 16]))
    stripes = np.zeros((20, 20, 3), dtype=np.uint8)
    stripes[6:14] = 255  # a square picture becomes 16 x 16, of which the middle 8 rows stay
    found = completer(stripes, output_type="np")
    assert found["original"].shape == (8, 16, 3) and found["mask"].shape == (2, 4)
    assert found["original"][2:6].min() > 0.9 and found["original"][0].max() < 0.7
    exact = RNG.integers(0, 256, (8, 16, 3), dtype=np.uint8)
    assert np.array_equal(np.array(completer(exact)["original"]), exact)


def test_grey_and_colour_are_converted() -> None:
    grey = PICTURE[..., 0]
    found = np.array(make()(grey, mask=CORNER)["image"])
    assert np.array_equal(found[~in_pixels(CORNER)], np.repeat(grey[..., None], 3, axis=2)[~in_pixels(CORNER)])
    shown = make(make_model(num_channels=1))(Image.fromarray(PICTURE), mask=CORNER)["image"]
    expected = np.array(Image.fromarray(PICTURE).convert("L"))
    difference = np.array(shown).astype(int) - expected
    assert shown.mode == "L" and np.abs(difference[~in_pixels(CORNER)]).max() <= 1


def test_another_normalisation_leaves_visible_pixels_as_they_are() -> None:
    model = make_model()
    scale = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    processor = EBTImageProcessor.from_model_config(model.config, **scale)
    found = make(model, image_processor=processor)(PICTURE, mask=CORNER, output_energies=True)
    assert np.array_equal(np.array(found["image"])[~in_pixels(CORNER)], PICTURE[~in_pixels(CORNER)])
    assert (np.abs(np.array(found["masked_image"])[in_pixels(CORNER)].astype(int) - 127) <= 1).all()
    assert found["energies"] != make(model)(PICTURE, mask=CORNER, output_energies=True)["energies"]


# ---- masks -----------------------------------------------------------------------------------------------------


def test_random_masks_have_their_share_and_follow_from_the_seed(completer: ImageCompletionPipeline) -> None:
    default = completer(PICTURE)["mask"]
    assert default.dtype == bool and default.sum() == 8  # half of them, as the model's config says
    assert completer(PICTURE, mask_ratio=0.25)["mask"].sum() == 4
    assert completer(PICTURE, mask_ratio=1.0)["mask"].all()
    assert completer(PICTURE, mask_ratio=1e-9)["mask"].sum() == 1
    assert np.array_equal(completer(PICTURES[1])["mask"], default)
    assert not np.array_equal(completer(PICTURE, mask_seed=1)["mask"], default)
    drawn = torch.stack([random_patches(16, 0.5, seed) for seed in range(200)]).float().mean(0)
    assert drawn.min() > 0.3 and drawn.max() < 0.7  # no patch is preferred


@pytest.mark.parametrize("kind", ["bool", "0 and 1", "0..255", "0..1", "PIL", "file", "tensor", "channel last"])
def test_a_mask_in_pixels_masks_the_patches_it_touches(
    completer: ImageCompletionPipeline, kind: str, tmp_path: Path
) -> None:
    pixels = np.zeros((16, 16), dtype=bool)
    pixels[7, 8] = pixels[12:, 14] = True
    as_bytes = (pixels * 255).astype(np.uint8)
    Image.fromarray(as_bytes).save(tmp_path / "mask.png")
    mask = {
        "bool": pixels,
        "0 and 1": pixels.astype(int),
        "0..255": as_bytes,
        "0..1": pixels * 0.9,
        "PIL": Image.fromarray(as_bytes),
        "file": str(tmp_path / "mask.png"),
        "tensor": torch.from_numpy(pixels)[None],
        "channel last": as_bytes[..., None],
    }[kind]
    assert np.array_equal(completer(PICTURE, mask=mask)["mask"], CORNER)


def test_a_mask_goes_the_way_of_its_picture(completer: ImageCompletionPipeline) -> None:
    # 40 x 80 becomes 16 x 32, of which the middle half stays: columns 20 to 59
    picture, mask = np.zeros((40, 80, 3), dtype=np.uint8), np.zeros((40, 80), dtype=bool)
    mask[0, 20] = mask[39, 59] = mask[:, 0] = True
    expected = np.zeros((4, 4), dtype=bool)
    expected[0, 0] = expected[3, 3] = True
    assert np.array_equal(completer(picture, mask=mask)["mask"], expected)
    small = np.zeros((8, 8), dtype=bool)
    small[1, 1] = True  # enlarged with its picture, and not smeared over its neighbours
    expected = np.zeros((4, 4), dtype=bool)
    expected[0, 0] = True
    assert np.array_equal(completer(picture[:8, :8], mask=small)["mask"], expected)
    with pytest.raises(ValueError, match="masks nothing of what the model sees"):
        completer(picture, mask=np.arange(80)[None].repeat(40, 0) < 10)


def test_every_picture_can_have_a_mask_of_its_own(completer: ImageCompletionPipeline) -> None:
    other = CORNER[::-1].copy()
    for masks in ([CORNER, other], [CORNER.ravel(), torch.from_numpy(other)], np.stack([CORNER, other])):
        found = completer([PICTURE, PICTURE], mask=masks, batch_size=2)
        assert np.array_equal(found[0]["mask"], CORNER) and np.array_equal(found[1]["mask"], other)
    found = completer([PICTURE, PICTURE], mask=[None, CORNER])
    assert found[0]["mask"].sum() == 8 and np.array_equal(found[1]["mask"], CORNER)
    both = completer(PICTURES[:2], mask=CORNER)
    assert all(np.array_equal(result["mask"], CORNER) for result in both)
    rows = datasets.Dataset.from_list([{"image": PICTURE.tolist(), "mask": other.tolist()}]).with_format("numpy")
    assert np.array_equal(next(completer(rows))["mask"], other)


# ---- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (PICTURE, {"mask_rato": 0.5}, "Unknown option.* mask_rato. Allowed: mask, mask_ratio"),
        (PICTURE, {"thinking_stepps": 3}, "Unknown thinking option.* stepps"),
        (PICTURE, {"mask_ratio": 0}, "`mask_ratio` must be above 0 and at most 1, got 0"),
        (PICTURE, {"mask_ratio": 1.5}, "`mask_ratio` must be above 0"),
        (PICTURE, {"mask_seed": -1}, "`mask_seed` must be an integer of at least 0, got -1"),
        (PICTURE, {"mask": CORNER, "mask_ratio": 0.5}, "have no effect"),
        (PICTURE, {"mask": np.zeros((4, 4), dtype=bool)}, "masks nothing"),
        (PICTURE, {"mask": np.ones((5, 4), dtype=bool)}, r"16 x 16 pixels, or be a grid of 4 x 4.*got.*\(5, 4\)"),
        (PICTURE, {"mask": 3}, "A mask must be a PIL image.*got int"),
        (PICTURE, {"mask": [CORNER]}, "1 masks and no list of pictures"),
        ([PICTURE, PICTURE], {"mask": [CORNER]}, "1 masks and 2 pictures"),
        (PICTURE, {"output_type": "jpg"}, "must be one of pil, np, pt, got 'jpg'"),
        (PICTURE, {"paste_visible": 1}, "`paste_visible` must be True or False, got 1"),
        (PICTURE, {"batch_size": 0}, "`batch_size` must be an integer of at least 1, got 0"),
        ([], {}, "the list is empty"),
        ([[PICTURE, PICTURE]], {}, "must be one picture, got 2"),
        ({"label": 1}, {}, "has no image: it has label"),
    ],
)
def test_mistakes_are_refused_in_words(
    completer: ImageCompletionPipeline, images: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        completer(images, **options)


def test_what_cannot_work_is_refused_at_once(completer: ImageCompletionPipeline) -> None:
    with pytest.raises(FileNotFoundError, match="no image file 'nowhere.png'"):
        completer("nowhere.png")
    with pytest.raises(ValueError, match="makes 18 x 30 pixels of the picture, and the model takes 16 x 16"):
        make(image_processor=EBTImageProcessor(patch_size=2))(PICTURES[1])
    with pytest.raises(ValueError, match="`mask` is an option of a call"):
        make(mask=CORNER)
    denoiser = EBTForImageDenoising(
        EBTImageConfig(image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(TypeError, match="EBTForImageDenoising does not complete images"):
        make(denoiser)
    with pytest.raises(TypeError, match="EBTForCausalLM does not complete images"):
        make(EBTForCausalLM(EBTConfig(vocab_size=9, hidden_size=8, num_attention_heads=2, num_hidden_layers=1)))
    with pytest.raises(ValueError, match="`batch_size` must be an integer of at least 1, got 0"):
        make(batch_size=0)([PICTURE])


# ---- saving ----------------------------------------------------------------------------------------------------


SCRIPT = """
import sys
sys.modules["ebt_transformers"] = None
sys.modules["diffusers"] = None
import numpy as np
import torch
from transformers import AutoImageProcessor, AutoModelForMaskedImageModeling, pipeline

folder, again = sys.argv[1:3]
expected = np.load(folder + "/expected.npz")
picture = expected["picture"]


def check(completer):
    found = completer(picture, output_type="np", output_energies=True)
    assert np.array_equal(found["mask"], expected["mask"])
    np.testing.assert_allclose(found["image"], expected["image"], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found["energies"], expected["energies"], rtol=1e-3)


completer = pipeline(model=folder + "/saved", trust_remote_code=True)
check(completer)
completer.save_pretrained(again)
check(pipeline("image-completion", model=again, trust_remote_code=True))
model = AutoModelForMaskedImageModeling.from_pretrained(folder + "/saved", trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(folder + "/saved", trust_remote_code=True)
pixels = processor(picture, return_tensors="pt").pixel_values
model.train()(pixels, bool_masked_pos=torch.arange(16)[None] < 8).loss.backward()
assert not any(name.startswith("ebt_transformers.") for name in sys.modules)
print("loaded without the package")
"""


def test_a_saved_pipeline_is_the_same_with_the_package_and_without(tmp_path: Path) -> None:
    completer = make(image_processor=EBTImageProcessor.from_model_config(make_model().config, image_mean=0.4))
    expected = completer(PICTURES[1], output_type="np", output_energies=True)
    completer.save_pretrained(tmp_path / "saved")
    for loaded in (
        pipeline("image-completion", model=str(tmp_path / "saved"), device="cpu"),
        make(EnergyTransformerForImageCompletion.from_pretrained(tmp_path / "saved")),
    ):
        assert loaded.image_processor.image_mean == 0.4
        found = loaded(PICTURES[1], output_type="np", output_energies=True)
        assert np.allclose(found["image"], expected["image"], atol=1e-5)
    arrays = {name: expected[name] for name in ("image", "mask", "energies")}
    np.savez(tmp_path / "expected.npz", picture=PICTURES[1], **arrays)
    cache = {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), str(tmp_path / "again")],
        env={**os.environ, **cache, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "loaded without the package" in done.stdout


# ---- plots -----------------------------------------------------------------------------------------------------


def test_plots_show_every_stage(completer: ImageCompletionPipeline, tmp_path: Path) -> None:
    results = completer(PICTURES[:2], thinking_steps=12, output_energies=True, output_trajectory=True)
    figure = plot_completion(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    titles = [axes.get_title() for axes in figure.axes[:9]]
    steps = ["0 steps", "1 step", "2 steps", "4 steps", "8 steps", "completed\n(12 steps)"]
    assert titles == ["original", "masked", *steps, "energy"] and len(figure.axes) == 18
    np.testing.assert_allclose(figure.axes[8].lines[0].get_ydata(), results[0]["energies"])
    for kind in ("np", "pt"):
        one = completer(PICTURE, output_type=kind, output_trajectory=True)
        assert len(plot_completion(one).axes) == 6  # no energy was asked for
    long = completer(PICTURE, thinking_steps=100, output_trajectory=True)
    assert [axes.get_title() for axes in plot_completion(long).axes][2:5] == ["0 steps", "4 steps", "8 steps"]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_plots_refuse_what_they_cannot_show(completer: ImageCompletionPipeline, count: int) -> None:
    messages = ["no result was given", "has no trajectory", r"different numbers of steps \(2, 3\)"]
    results = [completer(PICTURE, thinking_steps=2 + number, output_trajectory=count == 2) for number in range(count)]
    with pytest.raises(ValueError, match=messages[count]):
        plot_completion(results)


def test_the_processor_of_a_config_covers_its_size_and_is_saved(tmp_path: Path) -> None:
    config = EnergyTransformerConfig.for_images(image_size=[8, 16], patch_size=4, num_channels=1)
    processor = EBTImageProcessor.from_model_config(config)
    processor.save_pretrained(tmp_path)
    for one in (processor, EBTImageProcessor.from_pretrained(tmp_path)):
        assert one(PICTURES, return_tensors="pt").pixel_values.shape == (4, 1, 8, 16)
    with pytest.raises(ValueError, match="`keep_aspect_ratio` needs a `size` of `height` and `width`"):
        EBTImageProcessor(do_resize=True, size={"shortest_edge": 8}, keep_aspect_ratio=True, patch_size=4)(PICTURE)


# ---- the embedded model ----------------------------------------------------------------------------------------


def test_the_embedded_model_completes_better_than_the_mean_of_what_is_visible() -> None:
    picture = Image.open(example_picture_path()).convert("RGB")
    pieces = [picture.crop((left, top, left + 32, top + 32)) for left in (0, 32, 64, 96) for top in (0, 32, 64, 96)]
    model = str(completion_checkpoint_path())
    results = pipeline("image-completion", model=model, device="cpu")(pieces, output_type="np")
    errors, of_mean = [], []
    for result in results:
        hidden, original = in_pixels(result["mask"]), result["original"]
        errors.append(((result["image"] - original)[hidden] ** 2).mean())
        of_mean.append(((original[~hidden].mean(0) - original[hidden]) ** 2).mean())
    assert np.mean(errors) < 0.5 * np.mean(of_mean)


def test_the_embedded_model_has_the_numbers_on_its_card() -> None:
    folder = completion_checkpoint_path()
    recorded = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"| test mean squared error of masked patches       | {recorded['test_masked_mse']:9.4g} |" in card
    assert recorded["test_masked_mse"] == min(recorded[f"test_masked_mse_at_{steps}"] for steps in (1, 2, 3, 4, 8))
