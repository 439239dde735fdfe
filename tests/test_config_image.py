"""Laws of the image configuration: strict values, faithful JSON, the paper's presets, the noise levels it promises."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from ebt_transformers import PRESETS, EBTForImageDenoising, EBTImageConfig
from ebt_transformers.configuration.noise_ebt import noise_scheduler
from ebt_transformers.configuration.presets_ebt import IMAGE_RECIPES


UNUSUAL: dict[str, Any] = {
    "image_size": [24, 32],
    "patch_size": 8,
    "num_channels": 4,
    "hidden_size": 32,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "hidden_act": "silu",
    "layer_norm_eps": 1e-5,
    "initializer_range": 0.5,
    "image_conditioning": "noisy_image",
    "candidate_init": "normal",
    "candidate_init_std": 0.5,
    "reconstruction_loss": "l1",
    "vae_name_or_path": "some/vae",
    "num_landscapes": 2,
    "step_size": 7,
    "learn_step_size": False,
    "detach_between_steps": False,
    "loss_on_steps": "last",
    "random_step_size": 2,
    "random_steps": [2, 5],
    "thinking_steps": 6,
    "thinking_candidates": 2,
    "thinking_noise_std": 0.25,
    "thinking_tolerance": 1e-3,
    "thinking_target_energy": -1.5,
    "thinking_accept_only_lower_energy": True,
}


def test_a_config_survives_its_json(tmp_path: Path) -> None:
    config = EBTImageConfig(**UNUSUAL)
    config.save_pretrained(tmp_path)
    for loaded in (EBTImageConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is EBTImageConfig
        assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
        assert {name: getattr(loaded, name) for name in UNUSUAL} == UNUSUAL
    assert EBTImageConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert json.loads(config.to_json_string())["model_type"] == "ebt_image"


def test_the_defaults_are_the_papers_setting_at_its_smallest_size() -> None:
    config = EBTImageConfig()
    preset = EBTImageConfig.from_preset("xxs")
    assert config.to_dict() == preset.to_dict()
    assert config.grid == (8, 8) and config.default_thinking().steps == 1


@pytest.mark.parametrize("recipe", list(IMAGE_RECIPES))
@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_is_a_model_of_the_paper(name: str, recipe: str) -> None:
    config = EBTImageConfig.from_preset(name, recipe)
    preset = PRESETS[name]
    assert config.hidden_size == config.intermediate_size == preset.hidden_size
    assert (config.num_hidden_layers, config.num_attention_heads) == (
        preset.num_hidden_layers,
        preset.num_attention_heads,
    )
    assert config.num_landscapes == 1 and config.step_size == 3000
    if recipe == "s2":
        assert (config.random_step_size, config.random_steps, config.thinking_steps) == (2, [2, 3], 3)
        assert (config.loss_on_steps, config.detach_between_steps, config.learn_step_size) == ("last", False, False)
    with torch.device("meta"):
        assert EBTForImageDenoising(config).config is config


def test_preset_overrides_win() -> None:
    config = EBTImageConfig.from_preset("4xs", "s2", random_steps=None, step_size=10.0, hidden_size=64)
    assert (config.random_steps, config.step_size, config.hidden_size) == (None, 10.0, 64)


def test_an_unknown_preset_or_recipe_raises_listing_the_known() -> None:
    with pytest.raises(ValueError, match="5xs.*4xs, 3xs"):
        EBTImageConfig.from_preset("5xs")
    with pytest.raises(ValueError, match="s3.*s1, s2"):
        EBTImageConfig.from_preset("xxs", recipe="s3")


@pytest.mark.parametrize(
    ("size", "grid", "both"), [(32, (8, 8), (32, 32)), ([16, 32], (4, 8), (16, 32)), ([4, 4], (1, 1), (4, 4))]
)
def test_an_image_is_as_many_patches_as_fit(size: Any, grid: tuple[int, int], both: tuple[int, int]) -> None:
    config = EBTImageConfig(image_size=size, patch_size=4)
    assert config.grid == grid and config.height_and_width == both


@pytest.mark.parametrize(
    ("values", "spread"),
    [
        ({}, 0.0),
        ({"candidate_init_std": 0.2}, 0.2),
        ({"image_conditioning": "noisy_image"}, 0.0),
        ({"image_conditioning": "noisy_image", "candidate_init": "normal"}, 1.0),
        ({"image_conditioning": "noisy_image", "candidate_init": "normal", "candidate_init_std": 0.0}, 0.0),
    ],
    ids=str,
)
def test_the_spread_of_the_start_follows_from_where_it_is(values: dict[str, Any], spread: float) -> None:
    config = EBTImageConfig(**values)
    assert config.start_spread == spread and config.starts_at_random == (spread > 0)


def test_noise_of_training_is_not_the_default_of_evaluation() -> None:
    config = EBTImageConfig(thinking_noise_std=0.3, thinking_candidates=3)
    assert (config.default_thinking().noise_std, config.default_thinking().candidates) == (0.0, 3)


BAD: list[tuple[dict[str, Any], str]] = [
    *[({name: 0}, rf"{name}.*at least 1.*got 0") for name in ("patch_size", "num_channels", "hidden_size")],
    *[({name: 0}, rf"{name}.*at least 1.*got 0") for name in ("num_hidden_layers", "num_attention_heads")],
    ({"intermediate_size": -2}, "intermediate_size.*at least 1.*got -2"),
    ({"image_size": 0}, "image_size.*0.*positive multiple.*patch_size.*8"),
    ({"image_size": 100}, r"image_size.*100.*multiple.*patch_size.*8"),
    ({"image_size": [128, 100]}, r"image_size.*\[128, 100\].*multiple"),
    ({"image_size": [128]}, r"one number, or height and width, got \[128\]"),
    ({"image_size": [16, 16, 16]}, r"one number, or height and width"),
    ({"image_size": "128"}, "image_size.*'128'"),
    ({"hidden_size": 30, "num_attention_heads": 4}, "hidden_size.*30.*num_attention_heads.*4"),
    ({"hidden_size": 6, "num_attention_heads": 3}, "multiple of 4.*got 6"),
    ({"image_conditioning": "text"}, "image_conditioning.*none, noisy_image.*'text'"),
    ({"candidate_init": "zeros"}, "candidate_init.*image, normal.*'zeros'"),
    ({"candidate_init": "normal"}, "candidate_init='normal'.*image_conditioning='noisy_image'"),
    ({"candidate_init_std": -0.1}, "candidate_init_std.*at least 0.*-0.1"),
    ({"candidate_init_std": float("inf")}, "candidate_init_std.*finite.*inf"),
    ({"reconstruction_loss": "huber"}, "reconstruction_loss.*smooth_l1, mse, l1.*'huber'"),
    ({"num_landscapes": 0}, "num_landscapes.*at least 1.*got 0"),
    ({"loss_on_steps": "first"}, "loss_on_steps.*all, last.*'first'"),
    ({"step_size": 0}, "step_size.*above 0.*got 0"),
    ({"random_step_size": 0.5}, "random_step_size.*at least 1.*0.5"),
    ({"random_step_size": float("nan")}, "random_step_size.*at least 1.*nan"),
    *[({"random_steps": steps}, "random_steps.*fewest and the most") for steps in ([3, 2], [0, 2], [2], [1, 2, 3])],
    ({"random_steps": 3}, "random_steps"),
    ({"thinking_steps": 0}, "thinking_steps.*at least 1.*got 0"),
    ({"thinking_noise_std": -0.1}, "thinking_noise_std.*at least 0.*-0.1"),
    ({"thinking_stepz": 3}, "stepz.*steps"),
    ({"hidden_size": "16"}, "hidden_size.*'16'"),
]


@pytest.mark.parametrize(("values", "message"), BAD, ids=[str(values) for values, _ in BAD])
def test_a_bad_value_raises_naming_itself_and_what_is_allowed(values: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=rf"(?s){message}") as raised:
        EBTImageConfig(**values)
    assert isinstance(raised.value, ValueError) or isinstance(raised.value.__cause__, (ValueError, TypeError))


def test_a_bad_value_set_later_does_not_get_saved(tmp_path: Path) -> None:
    config = EBTImageConfig()
    config.reconstruction_loss = "huber"
    with pytest.raises(Exception, match="'huber'"):
        config.save_pretrained(tmp_path)


# --------------------------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize(("level", "kept", "noise"), [(0.1, 0.947, 0.321), (0.2, 0.812, 0.583), (1.0, 0.0, 1.0)])
def test_a_noise_level_keeps_and_adds_what_the_paper_says(level: float, kept: float, noise: float) -> None:
    pytest.importorskip("diffusers")
    scheduler, timestep = noise_scheduler(level)
    remaining = float(scheduler.alphas_cumprod[timestep])
    assert remaining**0.5 == pytest.approx(kept, abs=2e-2)
    assert (1 - remaining) ** 0.5 == pytest.approx(noise, abs=1e-3)


@pytest.mark.parametrize("level", [0.1, 0.3, 0.7, 0.05])
def test_rounding_does_not_cost_a_step_of_the_schedule(level: float) -> None:
    pytest.importorskip("diffusers")
    for steps in (3, 10, 100):
        scheduler, timestep = noise_scheduler(level, steps * 10)
        exact = steps * 10 * 100 // round(level * 100)
        assert (scheduler.config.num_train_timesteps, timestep) == (exact, steps * 10 - 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((0.0,), "noise_level.*above 0.*0.0"),
        ((1.5,), "noise_level.*at most 1.*1.5"),
        ((float("nan"),), "noise_level.*nan"),
        ((0.1, 0), "diffusion_steps.*at least 1.*0"),
        ((1.0, 10), "10 steps to a level of 1.0 are too few"),
    ],
)
def test_a_noise_level_that_makes_no_sense_raises(options: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        noise_scheduler(*options)


@pytest.mark.parametrize(("width", "warnings"), [(48, 0), (44, 1)])
def test_a_width_below_a_patch_warns(width: int, warnings: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from ebt_transformers.configuration import configuration_ebt_image

    said: list[str] = []
    monkeypatch.setattr(configuration_ebt_image.logger, "warning_once", said.append)
    EBTImageConfig(hidden_size=width, num_attention_heads=4, image_size=16, patch_size=4)
    assert len(said) == warnings
    assert all("48 numbers of a patch" in message for message in said)
