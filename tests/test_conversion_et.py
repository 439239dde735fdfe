"""Laws of the Energy Transformer's official weights: the same numbers, back bit for bit, and mistakes named."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from ebt_transformers import (
    EBTImageProcessor,
    EnergyTransformerConfig,
    EnergyTransformerForImageCompletion,
    cli,
    energy_transformer_from_official,
    energy_transformer_to_official,
)
from ebt_transformers.modeling_et.conversion_et import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    convert_energy_transformer,
    is_archive,
    is_flax,
    load_official_arrays,
)


HEADS, HEAD_DIM, WIDTH, MEMORIES, PATCH, GRID = 3, 8, 20, 24, 4, 3
Arrays = dict[str, np.ndarray]


def official(heads: int = HEADS, patch: int = PATCH, channels: int = 3, grid: int = GRID, **changed: Any) -> Arrays:
    """Random arrays of the official shapes, small; `changed` replaces some of them."""
    generator = np.random.default_rng(0)

    def normal(*shape: int, spread: float = 0.2) -> np.ndarray:
        return (spread * generator.standard_normal(shape)).astype(np.float32)

    numbers = channels * patch**2
    arrays = {
        "Wk": normal(heads, HEAD_DIM, WIDTH),
        "Wq": normal(heads, HEAD_DIM, WIDTH),
        "Xi": normal(WIDTH, MEMORIES),
        "Wenc": normal(numbers, WIDTH),
        "Benc": normal(WIDTH),
        "Wdec": normal(WIDTH, numbers),
        "Bdec": normal(numbers),
        "LNORM_gamma": np.float32(1.4),
        "LNORM_bias": normal(WIDTH),
        "CLS_token": normal(WIDTH),
        "MASK_token": normal(WIDTH),
        "POS_embed": normal(1 + grid**2, WIDTH),
    }
    return {name: value for name, value in {**arrays, **changed}.items() if value is not None}


def forward_by_hand(arrays: Arrays, image: np.ndarray, masked: np.ndarray, patch: int, steps: int = 12) -> np.ndarray:
    """What the released model does to one image (C, H, W), in double precision, with attention one query at a time."""
    weights = {name: value.astype(np.float64) for name, value in arrays.items()}
    channels, height, width = image.shape
    corners = [(top, left) for top in range(0, height, patch) for left in range(0, width, patch)]
    pixels = [image[:, top : top + patch, left : left + patch].reshape(-1) for top, left in corners]
    tokens = [each @ weights["Wenc"] + weights["Benc"] for each in pixels]
    tokens = [weights["MASK_token"] if hidden else token for token, hidden in zip(tokens, masked, strict=True)]
    state = np.stack([weights["CLS_token"], *tokens]) + weights["POS_embed"]

    def norm(state: np.ndarray) -> np.ndarray:
        centred = state - state.mean(1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
        return weights["LNORM_gamma"] * centred / deviation + weights["LNORM_bias"]

    beta = 1 / math.sqrt(weights["Wk"].shape[1])
    for _ in range(steps):
        normed = norm(state)
        down = np.maximum(normed @ weights["Xi"], 0) @ weights["Xi"].T
        for key, query in zip(weights["Wk"], weights["Wq"], strict=True):
            keys, queries = normed @ key.T, normed @ query.T
            for place, asking in enumerate(queries):
                shares = np.exp(beta * keys @ asking)
                shares /= shares.sum()
                down[place] += (shares @ keys) @ query
                down += np.outer(shares, asking @ key)
        state = state + 0.1 * down
    decoded = norm(state[1:]) @ weights["Wdec"] + weights["Bdec"]
    result = np.empty_like(image, dtype=np.float64)
    for (top, left), numbers in zip(corners, decoded, strict=True):
        result[:, top : top + patch, left : left + patch] = numbers.reshape(channels, patch, patch)
    return result


@pytest.mark.parametrize(
    ("sizes", "given"),
    [
        ({}, {}),
        ({"heads": 1, "patch": 2, "grid": 4}, {}),
        ({"channels": 1}, {"patch_size": 4}),
        ({"LNORM_gamma": np.ones(1, dtype=np.float32)}, {"image_size": 12}),
    ],
    ids=["colour", "one-head", "grey", "gamma-with-an-axis"],
)
@pytest.mark.parametrize("steps", [1, 12])
def test_the_model_gives_what_the_released_one_does(sizes: dict[str, Any], given: dict[str, Any], steps: int) -> None:
    arrays = official(**sizes)
    model = energy_transformer_from_official(arrays, **given)
    config, generator = model.config, np.random.default_rng(1)
    pictures = generator.standard_normal((2, config.num_channels, *config.height_and_width)).astype(np.float32)
    masked = generator.random((2, config.num_patches)) < 0.5
    masked[:, 0] = True
    with torch.no_grad():
        found = model(
            torch.from_numpy(pictures), bool_masked_pos=torch.from_numpy(masked), thinking_steps=steps
        ).reconstruction
    for row in range(2):
        expected = forward_by_hand(arrays, pictures[row], masked[row], config.patch_size, steps)
        assert_allclose(found[row].numpy(), expected, rtol=1e-5, atol=1e-5)


def test_the_default_is_the_setting_of_the_authors() -> None:
    model = energy_transformer_from_official(official())
    config = model.config
    assert not model.training
    assert (config.hidden_size, config.num_attention_heads, config.head_dim, config.num_memories) == (20, 3, 8, 24)
    assert (config.thinking_steps, config.step_size, config.self_attention, config.hopfield) == (12, 0.1, True, "relu")
    assert config.attention_beta == pytest.approx(1 / math.sqrt(8)) and config.layer_norm_eps == 1e-5
    assert (config.image_size, config.patch_size, config.num_channels) == (12, 4, 3)


def test_the_released_shapes_make_a_model_of_224_pixels() -> None:
    shapes = {
        **{"Wk": (12, 64, 768), "Wq": (12, 64, 768), "Xi": (768, 3072), "Wenc": (768, 768), "Benc": (768,)},
        **{"Wdec": (768, 768), "Bdec": (768,), "LNORM_gamma": (), "LNORM_bias": (768,)},
        **{"CLS_token": (768,), "MASK_token": (768,), "POS_embed": (197, 768)},
    }
    model = energy_transformer_from_official({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    assert (model.config.image_size, model.config.patch_size, model.config.attention_beta) == (224, 16, 1 / 8)
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_873_729


@pytest.mark.parametrize("sizes", [{}, {"channels": 1, "patch": 2}], ids=["colour", "grey"])
def test_weights_come_back_bit_for_bit(sizes: dict[str, int]) -> None:
    arrays = official(**sizes)
    model = energy_transformer_from_official(arrays, patch_size=sizes.get("patch"))
    again = energy_transformer_to_official(model)
    assert set(again) == set(arrays)
    for name, array in arrays.items():
        assert again[name].dtype == np.float32 and again[name].shape == np.shape(array)
        assert np.array_equal(again[name], array)
    again["Wk"][:] = 0  # copies: the model stays what it is
    assert np.array_equal(energy_transformer_to_official(model)["Wk"], arrays["Wk"])


def test_a_model_of_ours_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = EnergyTransformerConfig.for_images(
        hidden_size=16, num_attention_heads=2, image_size=[8, 16], patch_size=4
    )
    model = EnergyTransformerForImageCompletion(config)
    np.savez(tmp_path / "ours.npz", **energy_transformer_to_official(model))
    with pytest.raises(ValueError, match="8 patches, which make no square image. Give `image_size`"):
        energy_transformer_from_official(load_official_arrays(tmp_path / "ours.npz"))
    again = energy_transformer_from_official(load_official_arrays(tmp_path / "ours.npz"), image_size=[8, 16])
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [
        {"self_attention": False},
        {"hopfield": "softmax"},
        {"num_blocks": 2},
        {"thinking_steps": 6},
        {"step_size": 0.2},
        {"attention_beta": 1.0},
        {"layer_norm_eps": 1e-6},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_the_archive_has_no_place_for_is_refused(options: dict[str, Any]) -> None:
    small = {"hidden_size": 16, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    model = EnergyTransformerForImageCompletion(EnergyTransformerConfig.for_images(**small, **options))
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"nothing for `{name}={value!r}`; it must be"):
        energy_transformer_to_official(model)


@pytest.mark.parametrize(
    ("changed", "given", "said"),
    [
        ({"Wq": None, "CLS_token": None}, {}, "missing: Wq, CLS_token"),
        ({"extra": np.zeros(2)}, {}, "unexpected: extra"),
        ({"Wq": np.zeros((3, 8, 19))}, {}, r"of another shape: Wq \(3, 8, 19\), expected \(3, 8, 20\)"),
        ({"Xi": np.zeros((24, 20))}, {}, r"Xi \(24, 20\), expected \(20, K\)"),
        ({"Wdec": np.zeros((48, 20))}, {}, r"Wdec \(48, 20\), expected \(20, 48\)"),
        ({"Bdec": np.zeros(47)}, {}, r"Bdec \(47,\), expected \(48,\)"),
        ({"LNORM_gamma": np.ones(20)}, {}, r"LNORM_gamma \(20,\), expected one number"),
        ({"Wk": np.full((3, 8, 20), np.nan)}, {}, "no finite numbers: Wk"),
        ({"Benc": np.array(["a"] * 20)}, {}, "no finite numbers: Benc"),
        ({"POS_embed": np.zeros((9, 20))}, {}, "8 patches, which make no square image"),
        ({}, {"patch_size": 5}, "48 numbers of a patch, which does not fit `patch_size=5`"),
        ({}, {"image_size": 16}, "9 patches, but images of 16 with patches of 4 have 16"),
    ],
)
def test_arrays_that_do_not_fit_are_named(changed: dict[str, Any], given: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        energy_transformer_from_official(official(**changed), **given)


def test_patches_that_are_not_coloured_squares_need_a_size() -> None:
    with pytest.raises(ValueError, match="16 numbers of a patch, which is no square of 3 channels. Give `patch_size`"):
        energy_transformer_from_official(official(channels=1))


# ---- files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "plaindict_ckpt.npz"
    np.savez(path, **official())
    return path


def test_a_file_becomes_a_folder_with_model_and_processor(archive: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "model"
    model = convert_energy_transformer(archive, out)
    loaded = EnergyTransformerForImageCompletion.from_pretrained(out)
    assert np.array_equal(energy_transformer_to_official(loaded)["Xi"], official()["Xi"])
    processor = EBTImageProcessor.from_pretrained(out)
    assert (list(processor.image_mean), list(processor.image_std)) == (IMAGENET_MEAN, IMAGENET_STD)
    picture = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    pixels = processor(picture, return_tensors="pt").pixel_values
    assert_allclose(pixels[0].permute(1, 2, 0), (picture / 255 - IMAGENET_MEAN) / IMAGENET_STD, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(pixels).reconstruction, loaded.eval()(pixels).reconstruction)
    assert processor(np.zeros((40, 30, 3), np.uint8), return_tensors="pt").pixel_values.shape == (1, 3, 12, 12)
    with pytest.raises(FileExistsError, match="not empty"):
        convert_energy_transformer(archive, out)
    assert [path.name for path in out.parent.iterdir()] == ["model"]  # nothing half-written is left


def test_the_command_says_what_it_did(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["convert", str(archive), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert (
        "an Energy Transformer for images of 12 x 12 pixels in patches of 4 (width 20, 3 heads, 24 memories)" in said
    )
    assert (tmp_path / "out" / "model.safetensors").is_file()
    renamed = archive.rename(tmp_path / "weights.ckpt")  # what it is decides, not what it is called
    assert cli.main(["convert", str(renamed), str(tmp_path / "again")]) == 0


def broken(kind: str, tmp_path: Path) -> Path:
    """A file that cannot be converted."""
    path = tmp_path / ("checkpoint.ckpt" if kind == "flax" else "weights.npz")
    if kind == "missing":
        np.savez(path, **official(Wk=None))
    elif kind == "pickled":
        np.savez(path, Wk=np.array([{}], dtype=object))
    elif kind == "cut":
        np.savez(path, **official())
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "flax":  # MessagePack: {"step": 1, "params": {}}
        path.write_bytes(b"\x82\xa4step\x01\xa6params\x80")
    elif kind == "tensors":
        torch.save({"Wk": torch.zeros(2)}, path)
    else:
        path.write_text("nothing of the kind")
    return path


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("missing", "missing: Wk"),
        ("pickled", "cannot be read as a numpy archive of plain numbers"),
        ("cut", "is no numpy archive"),
        ("flax", "cannot be read without flax"),
        ("tensors", "is no numpy archive"),
        ("text", "is no numpy archive"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(
    kind: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = broken(kind, tmp_path)
    assert cli.main(["convert", str(path), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_is_for_text(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["convert", str(archive), str(tmp_path / "out"), "--tokenizer", "gpt2"]) == 2
    assert "--tokenizer has an effect on text models only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("start", "flax"),
    [
        (b"\x82\xa4step", True),
        (b"\xde\x00\x20\xa4step", True),
        (b"\xdf\x00\x00\x00\x20\xa4step", True),
        (b"\x81\xd9\x40", True),
        (b"\x80\x02}q\x00", False),
        (b"\x80\x04\x95\x20", False),
        (b"PK\x03\x04", False),
        (b"\x82\x01\x02", False),
        (b"\xdf\x00", False),
        (b"", False),
    ],
)
def test_flax_is_told_from_pickles_and_archives(start: bytes, flax: bool, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(start)
    assert is_flax(tmp_path / "file") == flax
    assert not is_archive(tmp_path / "file")


def test_torch_checkpoints_are_no_archives(archive: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "last.ckpt")
    assert is_archive(archive)
    assert not is_archive(tmp_path / "last.ckpt") and not is_flax(tmp_path / "last.ckpt")
    with pytest.raises(FileNotFoundError, match="There is no checkpoint file"):
        load_official_arrays(tmp_path / "nowhere.npz")
