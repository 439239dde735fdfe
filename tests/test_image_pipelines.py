"""Laws of the image pipelines: pictures of any size, one by one or together, whole or in tiles, give the same."""

import doctest
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

from ebt_transformers import (
    EBTDenoisingPipeline,
    EBTForImageDenoising,
    EBTImageConfig,
    EBTImageProcessor,
    ImageDenoisingPipeline,
)
from ebt_transformers.configuration.noise_ebt import noise_scheduler
from ebt_transformers.pipelines import diffusers_denoising, image_denoising
from ebt_transformers.pipelines.denoising import scale_for_noise
from ebt_transformers.pipelines.image_tiles import Canvas, Tiling


SMALL: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "step_size": 2.0,
}
SIZES = [(16, 16), (18, 30), (7, 9), (16, 16), (40, 12)]
RNG = np.random.default_rng(0)
PICTURES = [RNG.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]


def make_model(flat: bool = False, **overrides: Any) -> EBTForImageDenoising:
    """A tiny model; an untrained one has a flat energy, so it returns every image as it is."""
    torch.manual_seed(1)
    model = EBTForImageDenoising(EBTImageConfig(**{**SMALL, **overrides})).eval()
    if not flat:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "modulation" in name or "energy_head" in name:
                    parameter.normal_(std=0.3)
    return model


def make(flat: bool = False, **options: Any) -> ImageDenoisingPipeline:
    return pipeline("image-denoising", model=make_model(flat), device="cpu", **options)


@pytest.fixture(scope="module")
def denoiser() -> ImageDenoisingPipeline:
    return make(thinking_steps=2)


@pytest.fixture(scope="module")
def identity() -> ImageDenoisingPipeline:
    return make(flat=True)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random autoencoder with two pixels a side for each latent, saved."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    small = {"block_out_channels": (8, 16), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4}
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(**blocks, **small).save_pretrained(folder)
    return str(folder)


# ---- tiles -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16), (17, 40), (100, 5), (33, 31)])
@pytest.mark.parametrize("overlap", [0, 4, 15])
def test_tiles_cover_a_picture_and_blend_to_it(size: tuple[int, int], overlap: int) -> None:
    tiling = Tiling((16, 16), (overlap, overlap))
    picture = torch.randn(3, *size)
    places = tiling.places(*size)
    assert len(places) == 1 or max(size) > 16
    canvas = Canvas(picture.shape, tiling.overlap)
    for top, left, height, width in places:
        assert (height, width) == (min(16, size[0]), min(16, size[1]))
        assert top + height <= size[0] and left + width <= size[1]
        canvas.add(picture[:, top : top + height, left : left + width], top, left)
    torch.testing.assert_close(canvas.picture(), picture)
    rows = sorted({top for top, *_ in places})
    assert all(below - above <= 16 - overlap for above, below in zip(rows, rows[1:], strict=False))


def test_neighbouring_tiles_fade_into_one_another() -> None:
    canvas = Canvas((1, 1, 12), (0, 4))
    canvas.add(torch.zeros(1, 1, 8), 0, 0)
    canvas.add(torch.ones(1, 1, 8), 0, 4)
    row = canvas.picture()[0, 0]
    torch.testing.assert_close(row[4:8], torch.tensor([0.2, 0.4, 0.6, 0.8]))
    assert row[:4].eq(0).all() and row[8:].eq(1).all()


@pytest.mark.parametrize(("tile_size", "overlap"), [("auto", None), ("auto", 3), (8, 0), ((8, 16), 7), (None, None)])
def test_a_model_that_changes_nothing_returns_the_picture(
    identity: ImageDenoisingPipeline, tile_size: Any, overlap: int | None
) -> None:
    for picture in PICTURES:
        found = identity(picture, tile_size=tile_size, tile_overlap=overlap, batch_size=3)["image"]
        assert np.array_equal(np.array(found), picture)


def test_a_picture_no_larger_than_a_tile_is_denoised_whole(denoiser: ImageDenoisingPipeline) -> None:
    for picture in (PICTURES[0], PICTURES[2]):
        assert np.array_equal(denoiser(picture)["image"], denoiser(picture, tile_size=None)["image"])
    large = PICTURES[1]
    assert not np.array_equal(denoiser(large)["image"], denoiser(large, tile_size=None)["image"])


# ---- pipeline("image-denoising") ---------------------------------------------------------------------------------


def test_the_picture_is_the_model_s_own(denoiser: ImageDenoisingPipeline) -> None:
    inputs = denoiser.image_processor(PICTURES[0], return_tensors="pt")
    output = denoiser.model(**inputs, thinking_steps=2, output_energies=True, output_trajectory=True)
    record = denoiser(PICTURES[0], output_type="pt", output_energies=True, output_trajectory=True)
    torch.testing.assert_close(record["image"], (output.reconstruction[0] / 2 + 0.5).clamp(0, 1))
    torch.testing.assert_close(torch.tensor(record["energies"]), output.energies[0])
    torch.testing.assert_close(torch.stack(record["trajectory"]), (output.trajectory[0] / 2 + 0.5).clamp(0, 1))
    assert record["steps_taken"] == 2 and torch.equal(record["trajectory"][-1], record["image"])
    assert set(denoiser(PICTURES[0])) == {"image"}


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_pictures_of_unequal_sizes_give_together_what_each_gives_alone(
    denoiser: ImageDenoisingPipeline, batch_size: int
) -> None:
    options: dict[str, Any] = {"output_type": "np", "output_energies": True, "add_noise_level": 0.1}
    together = denoiser(PICTURES, batch_size=batch_size, **options)
    for picture, record in zip(PICTURES, together, strict=True):
        alone = denoiser(picture, **options)
        assert record["image"].shape == picture.shape
        np.testing.assert_allclose(record["image"], alone["image"], atol=1e-5)
        np.testing.assert_allclose(record["noisy_image"], alone["noisy_image"], atol=1e-5)
        np.testing.assert_allclose(record["energies"], alone["energies"], atol=1e-4)


def test_every_kind_of_input_gives_the_same(denoiser: ImageDenoisingPipeline, tmp_path: Path) -> None:
    import datasets

    picture = PICTURES[0]
    Image.fromarray(picture).save(tmp_path / "picture.png")
    path = str(tmp_path / "picture.png")
    table = datasets.Dataset.from_dict({"image": [path], "label": [3]}).cast_column("image", datasets.Image())
    expected = np.array(denoiser(picture)["image"])
    for single in (Image.fromarray(picture), path, tmp_path / "picture.png", torch.from_numpy(picture), picture / 255):
        assert np.array_equal(np.array(denoiser(single)["image"]), expected)
    lists = ([picture], (path,), picture[None], torch.from_numpy(picture)[None])
    lazy = (table, table["image"], KeyDataset(table, "image"), (item for item in [picture]))
    for several in (*lists, *lazy):
        found = denoiser(several)
        assert isinstance(found, list) == any(several is item for item in lists)
        (record,) = found
        assert np.array_equal(np.array(record["image"]), expected)


def test_thinking_reaches_the_model_from_construction_and_from_the_call() -> None:
    constructed = make(thinking_steps=3)

    def steps(**options: Any) -> int:
        return len(constructed(PICTURES[0], output_energies=True, **options)["energies"]) - 1

    assert steps() == 3
    assert steps(thinking_steps=2) == 2
    assert steps(thinking={"steps": 4}) == 4
    assert steps(thinking={"noise_std": 0.1}) == 3
    assert steps(thinking_landscapes=[0]) == 1
    assert steps(thinking={"candidates": 2, "noise_std": 0.1, "seed": 3}, thinking_tolerance=0.0) == 3


@pytest.mark.parametrize(
    ("images", "options", "error", "message"),
    [
        (PICTURES[0], {"thinking_stepz": 3}, ValueError, "stepz"),
        (PICTURES[0], {"output_energy": True}, ValueError, "output_energy.*output_energies"),
        (PICTURES[0], {"thinking_steps": 0}, ValueError, "thinking_steps.*got 0"),
        (PICTURES[0], {"output_type": "jpeg"}, ValueError, "one of pil, np, pt, got 'jpeg'"),
        (PICTURES[0], {"tile_size": 10}, ValueError, "multiples of 4.*got 10"),
        (PICTURES[0], {"tile_size": 0}, ValueError, "None for no tiles, got 0"),
        (PICTURES[0], {"tile_overlap": 16}, ValueError, "below the tile's side of 16.*got 16"),
        (PICTURES[0], {"tile_size": None, "tile_overlap": 2}, ValueError, "no meaning"),
        (PICTURES[0], {"add_noise_level": 1.5}, ValueError, "noise_level.*1.5"),
        (PICTURES[0], {"noise_std": -1}, ValueError, "noise_std.*got -1"),
        (PICTURES[0], {"noise_std": 10, "add_noise_level": 0.1}, ValueError, "Give one"),
        (PICTURES[0], {"batch_size": 0}, ValueError, "`batch_size`.*got 0"),
        ([], {}, ValueError, "the list is empty"),
        ([PICTURES[0], []], {}, ValueError, "the batch is empty"),
        ([[PICTURES[0], PICTURES[0]]], {}, ValueError, "one picture, got 2"),
        ([{"label": 1}], {}, ValueError, "no image: it has label"),
        (PICTURES[0].astype(np.float32), {}, ValueError, "floats must hold 0 to 1"),
        ("nowhere.png", {}, FileNotFoundError, "nowhere.png"),
    ],
)
def test_what_is_refused(
    denoiser: ImageDenoisingPipeline, images: Any, options: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        denoiser(images, **options)


def test_a_model_that_does_not_denoise_is_refused(make_model: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="EBTForCausalLM does not denoise"):
        pipeline("image-denoising", model=make_model(), device="cpu")
    with pytest.raises(ValueError, match="Unknown option.*tilesize"):
        make(tilesize=8)


def test_noise_is_added_as_in_training(identity: ImageDenoisingPipeline) -> None:
    record = identity(PICTURES[0], add_noise_level=0.2, noise_seed=3, output_type="pt")
    scheduler, timestep = noise_scheduler(0.2)
    clean = torch.from_numpy(PICTURES[0]).permute(2, 0, 1) / 127.5 - 1
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(3))
    expected = scheduler.add_noise(clean[None], noise[None], torch.tensor([timestep]))[0]
    torch.testing.assert_close(record["noisy_image"], (expected / 2 + 0.5).clamp(0, 1))
    torch.testing.assert_close(record["image"], record["noisy_image"])
    other = identity(PICTURES[0], add_noise_level=0.2, noise_seed=4, output_type="pt")
    assert not torch.equal(other["noisy_image"], record["noisy_image"])


@pytest.mark.parametrize("level", [0.05, 0.1, 0.2])
def test_a_noisy_photo_becomes_what_training_made(identity: ImageDenoisingPipeline, level: float) -> None:
    scheduler, timestep = noise_scheduler(level)
    kept = float(scheduler.alphas_cumprod[timestep])
    spread = math.sqrt((1 - kept) / kept)  # of the noise on an unscaled picture
    clean, noise = torch.randn(2, 1, 3, 8, 8).unbind(0)
    trained_on = scheduler.add_noise(clean, noise, torch.tensor([timestep]))
    torch.testing.assert_close((clean + spread * noise) * scale_for_noise(127.5 * spread), trained_on)
    found = identity(PICTURES[0], noise_std=127.5 * spread, output_type="np")["image"]
    np.testing.assert_allclose(found * 2 - 1, (PICTURES[0] / 127.5 - 1) * math.sqrt(kept), atol=1e-5)


def test_progress_is_shown_for_long_lists_and_on_request(
    identity: ImageDenoisingPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    identity(PICTURES)
    identity([PICTURES[0]] * 11, progress=False)
    assert capsys.readouterr().err == ""
    identity([PICTURES[0]] * 11)
    assert "11/11" in capsys.readouterr().err
    identity(PICTURES[1], progress=True, batch_size=2)  # 2 x 3 tiles
    assert "3/3" in capsys.readouterr().err


def test_a_saved_pipeline_gives_the_same(denoiser: ImageDenoisingPipeline, tmp_path: Path) -> None:
    processor = EBTImageProcessor.from_model_config(denoiser.model.config, do_resize=True, size=16)
    resizing = pipeline("image-denoising", model=denoiser.model, image_processor=processor, device="cpu")
    resizing.save_pretrained(tmp_path / "resizing")
    denoiser.model.save_pretrained(tmp_path / "model_alone")
    for saved, original in (("resizing", resizing), ("model_alone", denoiser)):
        loaded = pipeline("image-denoising", model=str(tmp_path / saved), device="cpu", thinking_steps=2)
        assert type(loaded) is ImageDenoisingPipeline
        with_model = pipeline("image-denoising", model=loaded.model, device="cpu")
        assert with_model.image_processor.to_dict() == loaded.image_processor.to_dict()
        assert loaded.image_processor.do_resize is (saved == "resizing")
        found, expected = (one(PICTURES[1], thinking_steps=2)["image"] for one in (loaded, original))
        assert found.size == expected.size == ((16, 16) if saved == "resizing" else (30, 18))
        assert np.abs(np.array(found).astype(int) - np.array(expected)).max() <= 1


# ---- latents -----------------------------------------------------------------------------------------------------


def test_a_model_on_latents_encodes_and_decodes(vae: str) -> None:
    from diffusers import AutoencoderKL

    model = make_model(flat=True, num_channels=4, vae_name_or_path=vae)
    lazy = pipeline("image-denoising", model=model, device="cpu")
    assert lazy._vae is None
    given = pipeline("image-denoising", model=model, device="cpu", vae=AutoencoderKL.from_pretrained(vae))
    picture = PICTURES[0]
    with torch.no_grad():
        pixels = torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1
        expected = given.vae.decode(given.vae.encode(pixels).latent_dist.mean).sample
    for pipe in (lazy, given):
        found = pipe(picture, output_type="pt", output_trajectory=True)
        torch.testing.assert_close(found["image"], (expected[0] / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-5)
        assert pipe(PICTURES[1], add_noise_level=0.1, tile_size=16, tile_overlap=4)["noisy_image"].size == (30, 18)
    with pytest.raises(ValueError, match="a multiple of 2"):
        lazy(picture, tile_overlap=3)
    with pytest.raises(ValueError, match="models on pixels"):
        lazy(picture, noise_std=10)


def test_an_autoencoder_that_does_not_fit_is_refused(vae: str) -> None:
    from diffusers import AutoencoderKL

    loaded = AutoencoderKL.from_pretrained(vae)
    with pytest.raises(ValueError, match="works on pixels"):
        make(vae=loaded)
    model = make_model(num_channels=3, vae_name_or_path=vae)
    with pytest.raises(ValueError, match="latents have 4 channels, the model takes 3"):
        pipeline("image-denoising", model=model, device="cpu", vae=loaded)
    with pytest.raises(ValueError, match="latents have 4 channels, the model takes 3"):
        EBTDenoisingPipeline(model)


# ---- diffusers ---------------------------------------------------------------------------------------------------


def make_diffusers(flat: bool = False, **overrides: Any) -> EBTDenoisingPipeline:
    pipe = EBTDenoisingPipeline(make_model(flat, **overrides))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_both_pipelines_agree(denoiser: ImageDenoisingPipeline) -> None:
    output = make_diffusers()(PICTURES, num_inference_steps=2, output_type="np", output_energies=True)
    records = denoiser(PICTURES, output_type="np", output_energies=True)
    for number, record in enumerate(records):
        np.testing.assert_allclose(output.images[number], record["image"], atol=1e-5)
        np.testing.assert_allclose(output.energies[number], record["energies"], atol=1e-4)
    assert output.steps_taken.tolist() == [2] * len(PICTURES)


def test_the_scheduler_makes_the_noise(identity: ImageDenoisingPipeline) -> None:
    pipe = make_diffusers(flat=True)
    expected = identity(PICTURES[0], add_noise_level=0.1, noise_seed=3, output_type="pt")["noisy_image"]
    generator = torch.Generator().manual_seed(3)
    found = pipe(PICTURES[0], noise_level=0.1, generator=generator, output_type="pt").images
    torch.testing.assert_close(found[0], expected)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    (both,) = pipe([PICTURES[0]] * 2, noise_level=0.1, generator=generators, output_type="pt", return_dict=False)
    torch.testing.assert_close(both, torch.stack([expected, expected]))
    as_photo = pipe(PICTURES[0], noise_std=40.0, output_type="np").images[0]
    np.testing.assert_allclose(as_photo, identity(PICTURES[0], noise_std=40.0, output_type="np")["image"])


def test_output_types_are_those_of_diffusers() -> None:
    pipe = make_diffusers(flat=True)
    same, other = PICTURES[0], PICTURES[1]
    assert pipe([same, same], output_type="np").images.shape == (2, 16, 16, 3)
    assert pipe([same, same], output_type="pt").images.shape == (2, 3, 16, 16)
    assert [image.size for image in pipe([same, other]).images] == [(16, 16), (30, 18)]
    assert [image.shape for image in pipe([same, other], output_type="np").images] == [(16, 16, 3), (18, 30, 3)]


@pytest.mark.parametrize("on_latents", [False, True])
def test_a_saved_diffusers_pipeline_gives_the_same(on_latents: bool, vae: str, tmp_path: Path) -> None:
    from diffusers import DDPMScheduler

    pipe = make_diffusers(**({"num_channels": 4, "vae_name_or_path": vae} if on_latents else {}))
    pipe.scheduler = DDPMScheduler(num_train_timesteps=50)
    pipe.save_pretrained(tmp_path)
    loaded = EBTDenoisingPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert (loaded.vae is None) is not on_latents
    assert loaded.scheduler.config.num_train_timesteps == 50
    found, expected = (
        one(PICTURES[1], 2, noise_level=0.1, generator=torch.manual_seed(0), output_type="np").images
        for one in (loaded, pipe)
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thinking_stepz": 2}, "stepz"),
        ({"guidance_scale": 2}, "guidance_scale"),
        ({"num_inference_steps": 2, "thinking_steps": 2}, "Give one"),
        ({"num_inference_steps": 0}, "got 0"),
        ({"noise_level": 1.5}, "1.5"),
        ({"noise_level": 0.1, "noise_std": 3.0}, "Give one"),
        ({"output_type": "latent"}, "'latent'"),
        ({"batch_size": 0}, "got 0"),
        ({"generator": [torch.Generator()] * 2, "noise_level": 0.1}, "2 generators for 1"),
    ],
)
def test_what_the_diffusers_pipeline_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_diffusers(flat=True)(PICTURES[0], **options)


# ---- the package -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [image_denoising, diffusers_denoising], ids=lambda module: module.__name__)
def test_examples_in_docstrings_run(module: Any) -> None:
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    examples = 0
    for test in doctest.DocTestFinder().find(module, module.__name__):
        for example in test.examples:
            example.want = example.want.replace("```\n", "")
        examples += len(test.examples)
        runner.run(test)
    assert examples and runner.summarize(verbose=False).failed == 0


def test_what_is_missing_is_named_when_it_is_needed(subprocess_env: dict[str, str]) -> None:
    code = (
        "import sys\nsys.modules['PIL'] = None\nwanted = []\n"
        "class NoDiffusers:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'diffusers':\n"
        "            wanted.append(name)\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, NoDiffusers())\n"
        "import ebt_transformers as e, numpy as np\nfrom transformers import pipeline\n"
        "assert not wanted and 'EBTDenoisingPipeline' in dir(e)\n"
        "size = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)\n"
        "model = e.EBTForImageDenoising(e.EBTImageConfig(**size))\n"
        "pipe = pipeline('image-denoising', model=model, device='cpu')\n"
        "picture = np.zeros((8, 8, 3))\n"
        "print(pipe(picture, output_type='np')['image'].shape)\n"
        "def tried(call):\n"
        "    try:\n        call()\n"
        "    except ImportError as error:\n        print(' '.join(str(error).split()))\n"
        "tried(lambda: pipe(picture))\n"
        "tried(lambda: pipe(picture, add_noise_level=0.1))\n"
        "tried(lambda: e.EBTDenoisingPipeline)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=subprocess_env, check=False
    )
    assert done.returncode == 0, done.stderr
    shape, pillow, noise, diffusers = done.stdout.splitlines()
    assert shape == "(8, 8, 3)" and "pillow" in pillow
    assert "`add_noise_level` needs the library diffusers: pip install 'ebt-transformers[diffusers]'" in noise
    assert "`EBTDenoisingPipeline` needs the library diffusers" in diffusers


def test_a_model_in_half_precision_works() -> None:
    model = make_model().to(torch.bfloat16)
    found = pipeline("image-denoising", model=model, device="cpu")(PICTURES[1], output_type="pt")["image"]
    assert found.dtype == torch.float32 and bool(torch.isfinite(found).all())


def test_a_model_in_training_mode_is_put_in_evaluation_mode() -> None:
    model = make_model().train()
    pipeline("image-denoising", model=model, device="cpu")
    assert not model.training
