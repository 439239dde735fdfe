"""Laws of `EBTImageProcessor`: every kind of picture in, -1..1 out, and back to the same picture."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from ebt_transformers import EBTForImageDenoising, EBTImageConfig, EBTImageProcessor


def auto_class_works() -> bool:
    """Whether transformers' AutoImageProcessor is usable; in 5.10 it is not without torchvision."""
    try:
        return AutoImageProcessor.from_pretrained is not None
    except ImportError:
        return False


needs_auto_class = pytest.mark.skipif(not auto_class_works(), reason="this transformers wants torchvision")


def random_picture(height: int = 16, width: int = 24, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def pixels(images: Any, **options: Any) -> torch.Tensor:
    return EBTImageProcessor(patch_size=4, **options)(images, return_tensors="pt").pixel_values


PICTURE = random_picture()
SAME_PICTURE: dict[str, Any] = {
    "PIL": Image.fromarray(PICTURE),
    "numpy": PICTURE,
    "numpy channels first": PICTURE.transpose(2, 0, 1),
    "numpy int64": PICTURE.astype(np.int64),
    "numpy 0..1": PICTURE / 255,
    "torch": torch.from_numpy(PICTURE),
    "torch channels first": torch.from_numpy(PICTURE).permute(2, 0, 1),
    "torch 0..1": torch.from_numpy(PICTURE).permute(2, 0, 1) / 255,
    "list": [PICTURE],
    "nested list": [[Image.fromarray(PICTURE)]],
    "batch": PICTURE[None],
    "with alpha": np.concatenate([PICTURE, PICTURE[..., :1]], axis=-1),
    "PIL with alpha": Image.fromarray(np.concatenate([PICTURE, PICTURE[..., :1]], axis=-1)),
}


@pytest.mark.parametrize("kind", SAME_PICTURE)
def test_every_kind_of_picture_becomes_the_same_pixels(kind: str) -> None:
    expected = torch.from_numpy(PICTURE).permute(2, 0, 1)[None] / 127.5 - 1
    found = pixels(SAME_PICTURE[kind])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-6)


def test_files_are_opened_upright_and_with_all_their_bits(tmp_path: Path) -> None:
    picture = Image.fromarray(PICTURE)
    picture.save(tmp_path / "plain.png")
    torch.testing.assert_close(pixels(str(tmp_path / "plain.png")), pixels(PICTURE))
    torch.testing.assert_close(pixels([tmp_path / "plain.png"] * 2), pixels([PICTURE] * 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    picture.save(tmp_path / "turned.png", exif=exif)
    torch.testing.assert_close(pixels(str(tmp_path / "turned.png")), pixels(np.rot90(PICTURE, -1)))
    deep = np.linspace(0, 65535, 16 * 16).reshape(16, 16).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    found = pixels(str(tmp_path / "deep.png"), num_channels=1)
    torch.testing.assert_close(found[0, 0], torch.tensor(deep / 32767.5 - 1, dtype=torch.float32), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "grey", [PICTURE[..., 0], PICTURE[..., :1], Image.fromarray(PICTURE[..., 0])], ids=["plane", "one channel", "PIL"]
)
def test_grey_pictures_become_what_the_model_takes(grey: Any) -> None:
    assert pixels(grey).shape == (1, 3, 16, 24)
    assert torch.equal(pixels(grey)[:, 0], pixels(grey)[:, 2])
    torch.testing.assert_close(pixels(grey, num_channels=1)[0, 0], torch.from_numpy(PICTURE[..., 0]) / 127.5 - 1)


def test_colour_becomes_grey_as_pil_does_it() -> None:
    expected = np.array(Image.fromarray(PICTURE).convert("L")) / 127.5 - 1
    assert np.abs(pixels(PICTURE, num_channels=1)[0, 0].numpy() - expected).max() < 1.01 / 127.5


@pytest.mark.parametrize("channels", [1, 3])
def test_there_and_back_is_the_same_picture(channels: int) -> None:
    processor = EBTImageProcessor(patch_size=4, num_channels=channels)
    pictures = [random_picture(channels=channels), 255 - random_picture(channels=channels)]
    found = processor(pictures, return_tensors="pt").pixel_values
    for picture, pil, array, tensor in zip(
        pictures, *(processor.post_process(found, kind) for kind in ("pil", "np", "pt")), strict=True
    ):
        assert np.array_equal(np.array(pil).reshape(picture.shape), picture)
        np.testing.assert_allclose(array, picture / 255, atol=1e-6)
        np.testing.assert_allclose(tensor.permute(1, 2, 0), picture / 255, atol=1e-6)


@pytest.mark.parametrize("size", [(17, 23), (1, 1), (2, 30)])
def test_padding_mirrors_the_picture_and_is_cut_off_again(size: tuple[int, int]) -> None:
    processor = EBTImageProcessor(patch_size=8, do_pad=True)
    picture = random_picture(*size)
    inputs = processor(picture, return_tensors="pt")
    height, width = inputs.pixel_values.shape[-2:]
    assert (height % 8, width % 8) == (0, 0) and height - size[0] < 8 and width - size[1] < 8
    if size[0] == 17:
        assert torch.equal(inputs.pixel_values[..., 17, :23], inputs.pixel_values[..., 15, :23])
    (back,) = processor.post_process(inputs.pixel_values, original_sizes=inputs.original_sizes)
    assert np.array_equal(np.array(back), picture)


def test_a_batch_is_its_pictures() -> None:
    pictures = [random_picture(), 255 - random_picture()]
    options = {"do_resize": True, "size": 12, "do_center_crop": True, "crop_size": 8}
    together = pixels(pictures, **options)
    assert torch.equal(together, torch.cat([pixels(picture, **options) for picture in pictures]))


def test_resizing_and_cropping() -> None:
    assert pixels(PICTURE, do_resize=True, size={"shortest_edge": 32}).shape == (1, 3, 32, 48)
    assert pixels(PICTURE, do_resize=True, size={"height": 8, "width": 12}).shape == (1, 3, 8, 12)
    assert pixels(PICTURE, do_resize=True, size=[8, 12]).shape == (1, 3, 8, 12)
    assert pixels(PICTURE, do_resize=True, size=8).shape == (1, 3, 8, 8)
    cropped = pixels(PICTURE, do_center_crop=True, crop_size=8)
    assert torch.equal(cropped, pixels(PICTURE)[..., 4:12, 8:16])
    noise = pixels(PICTURE, do_resize=True, size=32)
    assert noise.min() >= -1 and noise.max() <= 1
    smooth = np.add.outer(np.arange(16), 8 * np.arange(24)).astype(np.uint8)
    expected = np.array(Image.fromarray(smooth).resize((32, 32), Image.Resampling.BICUBIC)) / 127.5 - 1
    assert np.abs(pixels(smooth, do_resize=True, size=32)[0, 0].numpy() - expected).max() < 1.01 / 127.5


def test_scaled_images_pass_as_they_are() -> None:
    noisy = torch.randn(2, 3, 8, 8) * 2
    found = pixels(noisy, do_rescale=False, do_normalize=False)
    assert torch.equal(found, noisy)
    shown = EBTImageProcessor().post_process(noisy, "pt")
    assert torch.equal(torch.stack(shown), (noisy / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize(
    ("images", "options", "error", "message"),
    [
        ([], {}, ValueError, "the batch is empty"),
        (np.zeros((0, 8, 8, 3)), {}, ValueError, "the batch is empty"),
        (np.zeros((0, 8, 3)), {}, ValueError, "no pixels"),
        (np.zeros((8, 8, 2)), {}, ValueError, r"1, 3 or 4 channels.*\(8, 8, 2\)"),
        (np.zeros((8, 8, 4)), {"num_channels": 5}, ValueError, "takes images of 5"),
        (np.zeros((1, 2, 3, 4, 5)), {}, ValueError, "got the shape"),
        (np.full((8, 8, 3), np.nan), {}, ValueError, "not finite"),
        (np.full((8, 8, 3), 200.0), {}, ValueError, r"floats must hold 0 to 1, got 200.*Divide"),
        (np.full((8, 8, 3), -0.5), {}, ValueError, "do_rescale=False"),
        (np.full((8, 8, 3), 300), {}, ValueError, "integers must hold 0 to 255, got 300"),
        (np.full((8, 8, 3), 200), {"do_rescale": False}, ValueError, "need `do_rescale=True`"),
        (np.zeros((9, 8, 3)), {}, ValueError, "multiples of the patch size 4, got 9 x 8.*do_pad=True"),
        ([np.zeros((8, 8, 3)), np.zeros((8, 4, 3))], {}, ValueError, "unequal sizes.*8 x 4, 8 x 8.*one by one"),
        (PICTURE, {"do_center_crop": True, "crop_size": 20}, ValueError, "larger than an image"),
        ("no_such_file.png", {}, FileNotFoundError, "no image file 'no_such_file.png'"),
        (3, {}, TypeError, "got int"),
        ({"image": PICTURE}, {}, TypeError, "got dict"),
        (np.array([["a"]]), {}, TypeError, "integers or floats"),
        (PICTURE, {"do_paad": True}, ValueError, "Unknown.*do_paad.*do_pad"),
        (PICTURE, {"patch_size": 0}, ValueError, "`patch_size` must be an integer of at least 1, got 0"),
    ],
)
def test_what_is_refused(images: Any, options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        EBTImageProcessor(patch_size=4)(images, return_tensors="pt", **options)


def test_unequal_sizes_are_fine_as_a_list() -> None:
    found = EBTImageProcessor(patch_size=4)([PICTURE, PICTURE[:8, :8]])["pixel_values"]
    assert [image.shape for image in found] == [(3, 16, 24), (3, 8, 8)]


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (torch.zeros(1, 3, 8, 8), {"output_type": "jpeg"}, "`output_type` must be one of pil, np, pt, got 'jpeg'"),
        (torch.zeros(3, 8, 8), {}, "first dimension of 1"),
        (torch.full((1, 3, 8, 8), torch.inf), {}, "not finite"),
        (torch.zeros(1, 3, 8, 8), {"original_sizes": [(9, 8)]}, "at most 8 x 8"),
        (torch.zeros(1, 3, 8, 8), {"original_sizes": [(8, 8), (8, 8)]}, "each of the 1 image"),
        (torch.zeros(1, 4, 8, 8), {}, "1 or 3 channels, got 4"),
    ],
)
def test_what_post_processing_refuses(images: torch.Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EBTImageProcessor().post_process(images, **options)


def test_unknown_options_are_refused_at_construction() -> None:
    with pytest.raises(ValueError, match="Unknown.*patchsize"):
        EBTImageProcessor(patchsize=4)


def test_the_model_s_config_makes_its_processor() -> None:
    processor = EBTImageProcessor.from_model_config(EBTImageConfig(patch_size=4, num_channels=1), do_pad=True)
    assert (processor.patch_size, processor.num_channels, processor.do_pad) == (4, 1, True)
    on_latents = EBTImageConfig(patch_size=2, num_channels=4, vae_name_or_path="x")
    assert EBTImageProcessor.from_model_config(on_latents).patch_size == 16
    assert EBTImageProcessor.from_model_config(on_latents, vae_scale_factor=2).patch_size == 4
    assert EBTImageProcessor.from_model_config(on_latents).num_channels == 3


def test_saving_and_loading_changes_nothing(tmp_path: Path) -> None:
    options = {"size": {"shortest_edge": 20}, "crop_size": 16, "image_mean": [0.4, 0.5, 0.6], "do_pad": True}
    processor = EBTImageProcessor(patch_size=4, do_resize=True, do_center_crop=True, **options)
    processor.save_pretrained(tmp_path)
    for loader in [EBTImageProcessor] + [AutoImageProcessor] * auto_class_works():
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is EBTImageProcessor
        assert loaded.to_dict() == processor.to_dict() | {"auto_map": loaded.auto_map}
        assert torch.equal(
            loaded(PICTURE, return_tensors="pt").pixel_values, processor(PICTURE, return_tensors="pt").pixel_values
        )
    changed = EBTImageProcessor.from_pretrained(tmp_path, do_center_crop=False)
    assert changed.do_center_crop is False and changed.do_resize is True


REMOTE = """
import sys, json, numpy, torch
sys.modules['ebt_transformers'] = None
from transformers import AutoImageProcessor, AutoModelForImageToImage
processor = AutoImageProcessor.from_pretrained('model', trust_remote_code=True)
assert type(processor).__module__.startswith('transformers_modules')
inputs = processor(numpy.load('picture.npy'), return_tensors='pt')
model = AutoModelForImageToImage.from_pretrained('model', trust_remote_code=True)
output = model(**inputs, output_energies=True)
found = {'pixels': inputs.pixel_values, 'energies': output.energies, 'reconstruction': output.reconstruction}
found['back'] = torch.from_numpy(processor.post_process(inputs.pixel_values, 'np')[0])
print(json.dumps({name: value.tolist() for name, value in found.items()}))
"""


@pytest.fixture(scope="module")
def without_the_package(
    tmp_path_factory: pytest.TempPathFactory, subprocess_env: dict[str, str]
) -> tuple[EBTForImageDenoising, dict[str, Any]]:
    """A model, and what its saved folder gives in a process that cannot import this package."""
    folder = tmp_path_factory.mktemp("remote")
    torch.manual_seed(0)
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = EBTForImageDenoising(EBTImageConfig(image_size=8, patch_size=4, **small)).eval()
    torch.nn.init.normal_(model.model.energy_head.weight)  # it starts flat
    model.save_pretrained(folder / "model")
    EBTImageProcessor.from_model_config(model.config).save_pretrained(folder / "model")
    np.save(folder / "picture.npy", PICTURE)
    environment = {**subprocess_env, "HF_MODULES_CACHE": str(folder / "modules")}
    command = [sys.executable, "-c", REMOTE]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return model, json.loads(done.stdout)


@needs_auto_class
def test_a_saved_processor_works_where_the_package_is_not(
    without_the_package: tuple[EBTForImageDenoising, dict[str, Any]],
) -> None:
    _, found = without_the_package
    torch.testing.assert_close(torch.tensor(found["pixels"]), pixels(PICTURE))
    np.testing.assert_allclose(found["back"], PICTURE / 255, atol=1e-6)


@needs_auto_class
def test_a_saved_model_works_where_the_package_is_not(
    without_the_package: tuple[EBTForImageDenoising, dict[str, Any]],
) -> None:
    model, found = without_the_package
    output = model(pixels(PICTURE), output_energies=True)
    torch.testing.assert_close(torch.tensor(found["energies"]), output.energies)
    torch.testing.assert_close(torch.tensor(found["reconstruction"]), output.reconstruction)
