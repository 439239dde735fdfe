"""Laws of the configurations: strict values, faithful JSON, the paper's presets."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM

from ebt_transformers import PRESETS, EBTConfig, EBTForCausalLM, ThinkingConfig, transformer_pp_config
from ebt_transformers.configuration import FLAT_THINKING_NAMES, RECIPES


UNUSUAL: dict[str, Any] = {
    "vocab_size": 41,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 33,
    "rms_norm_eps": 1e-4,
    "initializer_range": 0.5,
    "step_conditioning": "adaln",
    "num_landscapes": 5,
    "candidate_embedding": "shared",
    "candidate_anchor": "token",
    "candidate_init": "zeros",
    "candidate_init_std": 0.5,
    "proposal_loss_weight": 0.5,
    "step_size": 7,
    "learn_step_size": False,
    "update": "residual",
    "detach_between_steps": False,
    "loss_on_steps": "last",
    "thinking_steps": 6,
    "thinking_candidates": 2,
    "thinking_noise_std": 0.25,
    "thinking_tolerance": 1e-3,
    "thinking_target_energy": -1.5,
    "thinking_accept_only_lower_energy": True,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}


def test_a_config_survives_its_json(tmp_path: Path) -> None:
    config = EBTConfig(**UNUSUAL)
    config.save_pretrained(tmp_path)
    for loaded in (EBTConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is EBTConfig
        assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
        assert {name: getattr(loaded, name) for name in UNUSUAL} == UNUSUAL
    assert EBTConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert json.loads(config.to_json_string())["model_type"] == "ebt"


def test_the_defaults_are_the_smallest_published_model() -> None:
    config = EBTConfig()
    assert config.to_dict() == EBTConfig.from_preset("xxs", recipe="s1").to_dict()
    assert (config.intermediate_size, config.num_key_value_heads, config.head_dim) == (384, 6, 64)
    assert config.tie_word_embeddings is False


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_is_a_model_of_the_paper(name: str, recipe: str) -> None:
    config = EBTConfig.from_preset(name, recipe=recipe)
    preset = PRESETS[name]
    assert config.hidden_size == config.intermediate_size == preset.hidden_size
    assert config.num_hidden_layers == preset.num_hidden_layers
    assert config.num_key_value_heads == preset.num_attention_heads
    assert {field: getattr(config, field) for field in RECIPES[recipe]} == RECIPES[recipe]
    with torch.device("meta"):
        model = EBTForCausalLM(config)
    assert model.num_parameters() > 0


def test_preset_overrides_win() -> None:
    config = EBTConfig.from_preset("4xs", recipe="s2", vocab_size=99, step_size=1.0, hidden_size=64)
    assert (config.vocab_size, config.step_size, config.hidden_size) == (99, 1.0, 64)


def test_a_preset_without_conditioning_walks_one_landscape_as_many_steps() -> None:
    config = EBTConfig.from_preset("4xs", step_conditioning="none")
    assert config.num_landscapes == 1
    assert config.default_thinking().steps == 2


def test_the_default_number_of_steps_is_the_number_of_landscapes() -> None:
    assert EBTConfig(num_landscapes=4).default_thinking().steps == 4
    assert EBTConfig(num_landscapes=4, thinking_steps=9).default_thinking().steps == 9


def test_shared_embeddings_are_tied_embeddings() -> None:
    assert EBTConfig(candidate_embedding="shared").tie_word_embeddings is True
    assert EBTConfig(candidate_embedding="linear").tie_word_embeddings is False


BAD: list[tuple[dict[str, Any], str]] = [
    *[({name: 0}, rf"{name}.*at least 1.*got 0") for name in ("vocab_size", "hidden_size", "num_hidden_layers")],
    *[({name: 0}, rf"{name}.*at least 1.*got 0") for name in ("num_attention_heads", "num_key_value_heads")],
    *[({name: -2}, rf"{name}.*at least 1.*got -2") for name in ("intermediate_size", "max_position_embeddings")],
    ({"num_landscapes": 0}, "num_landscapes.*at least 1.*got 0"),
    ({"step_conditioning": "film"}, "step_conditioning.*none, time_embed, adaln, adaln_zero.*'film'"),
    ({"candidate_embedding": "mlp"}, "candidate_embedding.*linear, shared.*'mlp'"),
    ({"candidate_anchor": "position"}, "candidate_anchor.*none, token.*'position'"),
    ({"candidate_init": "ones"}, "candidate_init.*normal, zeros, proposal.*'ones'"),
    ({"update": "add"}, "update.*replace, residual.*'add'"),
    ({"loss_on_steps": "first"}, "loss_on_steps.*all, last.*'first'"),
    ({"hidden_size": 30, "num_attention_heads": 4}, "hidden_size.*30.*num_attention_heads.*4"),
    ({"hidden_size": 12, "num_attention_heads": 4}, "even.*got 3"),
    ({"num_attention_heads": 6, "num_key_value_heads": 4}, "num_attention_heads.*6.*num_key_value_heads.*4"),
    ({"step_conditioning": "none", "num_landscapes": 2}, "num_landscapes=2"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings=True.*candidate_embedding='linear'"),
    ({"step_size": 0}, "step_size.*above 0.*got 0"),
    ({"step_size": float("nan")}, "step_size.*finite.*nan"),
    ({"proposal_loss_weight": -1.0}, "proposal_loss_weight.*at least 0.*-1.0"),
    ({"candidate_init_std": -1.0}, "candidate_init_std.*at least 0.*-1.0"),
    ({"thinking_steps": 0}, "thinking_steps.*at least 1.*got 0"),
    ({"thinking_candidates": 0}, "thinking_candidates.*at least 1.*got 0"),
    ({"thinking_noise_std": -0.1}, "thinking_noise_std.*at least 0.*-0.1"),
    ({"thinking_tolerance": -0.1}, "thinking_tolerance.*at least 0.*-0.1"),
    ({"thinking_stepz": 3}, "stepz.*steps"),
    ({"hidden_size": "16"}, "hidden_size.*'16'"),
]


@pytest.mark.parametrize(("values", "message"), BAD, ids=[str(values) for values, _ in BAD])
def test_a_bad_value_raises_naming_itself_and_what_is_allowed(values: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=rf"(?s){message}") as raised:
        EBTConfig(**values)
    assert isinstance(raised.value, ValueError) or isinstance(raised.value.__cause__, (ValueError, TypeError))


def test_a_bad_value_set_later_does_not_get_saved(tmp_path: Path) -> None:
    config = EBTConfig()
    config.update = "add"
    with pytest.raises(Exception, match="'add'"):
        config.save_pretrained(tmp_path)


@pytest.mark.parametrize(("given", "message"), [("5xs", "5xs.*4xs, 3xs"), ("XXS", "XXS.*xxs")])
def test_an_unknown_preset_raises_listing_the_known(given: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EBTConfig.from_preset(given)
    with pytest.raises(ValueError, match=message):
        transformer_pp_config(given)


def test_an_unknown_recipe_raises_listing_the_known() -> None:
    with pytest.raises(ValueError, match="s3.*s1, s2"):
        EBTConfig.from_preset("xxs", recipe="s3")


# ------------------------------------------------------------------------------------------------------ ThinkingConfig

BAD_THINKING: list[tuple[dict[str, Any], str]] = [
    ({"steps": -1}, "thinking_steps.*at least 0.*got -1"),
    ({"steps": 2.0}, "thinking_steps.*integer.*2.0"),
    ({"steps": True}, "thinking_steps.*integer.*True"),
    ({"candidates": -1}, "thinking_candidates.*-1"),
    ({"selection": "best"}, "thinking_selection.*min_energy, max_gap, max_energy.*'best'"),
    ({"init": "zeros"}, "thinking_init.*mean, normal.*'zeros'"),
    ({"step_size": 0}, "thinking_step_size.*above 0.*got 0"),
    ({"step_size": float("inf")}, "thinking_step_size.*finite.*inf"),
    ({"step_size_scale": -1.0}, "thinking_step_size_scale.*above 0.*-1.0"),
    ({"step_size_scale": []}, r"thinking_step_size_scale.*\[\]"),
    ({"step_size_scale": [1.0, 0.0]}, r"thinking_step_size_scale.*\[1.0, 0.0\]"),
    ({"noise_std": -0.5}, "thinking_noise_std.*-0.5"),
    ({"noise_std": float("nan")}, "thinking_noise_std.*nan"),
    ({"noise_first_step_only": 1}, "thinking_noise_first_step_only.*True or False.*1"),
    ({"accept_only_lower_energy": "yes"}, "thinking_accept_only_lower_energy.*'yes'"),
    ({"tolerance": -1}, "thinking_tolerance.*-1"),
    ({"target_energy": float("nan")}, "thinking_target_energy.*finite.*nan"),
    ({"seed": -2}, "thinking_seed.*-2"),
    ({"landscapes": []}, r"thinking_landscapes.*\[\]"),
    ({"landscapes": [0, -1]}, r"thinking_landscapes.*\[0, -1\]"),
    ({"landscapes": [0, 1], "steps": 3}, r"thinking_landscapes.*3.*\[0, 1\]"),
]


@pytest.mark.parametrize(("values", "message"), BAD_THINKING, ids=[str(values) for values, _ in BAD_THINKING])
def test_bad_thinking_raises_naming_itself_and_what_is_allowed(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ThinkingConfig(**values)
    with pytest.raises(ValueError, match=message):
        ThinkingConfig.from_value({f"thinking_{name}": value for name, value in values.items()})


def test_unknown_thinking_raises_listing_the_known() -> None:
    with pytest.raises(ValueError, match="stepz.*Allowed: steps, candidates"):
        ThinkingConfig.from_value({"stepz": 3})
    with pytest.raises(TypeError, match="stepz"):
        ThinkingConfig(stepz=3)
    with pytest.raises(TypeError, match="ThinkingConfig or a dict.*int"):
        ThinkingConfig.from_value(3)


def test_thinking_survives_its_flat_form() -> None:
    config = ThinkingConfig(steps=8, candidates=4, step_size_scale=[1.0] * 8, tolerance=0.0, seed=-1)
    assert ThinkingConfig.from_value(config.to_flat_dict()) == config
    assert set(config.to_flat_dict()) <= set(FLAT_THINKING_NAMES)
    assert ThinkingConfig().to_flat_dict() == {}


def test_set_fields_win_over_those_they_are_merged_over() -> None:
    merged = ThinkingConfig(steps=3, noise_std=0.0).merged_over(ThinkingConfig(steps=9, candidates=2, noise_std=1.0))
    assert merged == ThinkingConfig(steps=3, candidates=2, noise_std=0.0)
    assert ThinkingConfig(landscapes=[0, 0]).merged_over(ThinkingConfig(steps=9)) == ThinkingConfig(landscapes=[0, 0])
    assert ThinkingConfig(steps=2).merged_over(ThinkingConfig(landscapes=[0])) == ThinkingConfig(steps=2)


def test_thinking_cannot_be_changed_after_it_was_checked() -> None:
    with pytest.raises(AttributeError):
        ThinkingConfig().steps = 0


# ------------------------------------------------------------------------------------------------------------ the twin


def test_the_twin_has_the_shape_of_its_ebt() -> None:
    ebt = EBTConfig(
        vocab_size=41,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        step_conditioning="none",
        num_landscapes=1,
    )
    twin, model = LlamaForCausalLM(transformer_pp_config(ebt)), EBTForCausalLM(ebt)
    own = sum(parameter.numel() for name, parameter in model.named_parameters() if "energy" in name or "step" in name)
    assert twin.num_parameters() == model.num_parameters() - own
    assert transformer_pp_config("4xs", vocab_size=99, hidden_act="gelu").hidden_act == "gelu"
    assert transformer_pp_config("xxs").vocab_size == EBTConfig.from_preset("xxs").vocab_size
