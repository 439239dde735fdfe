"""Laws of giving a trained language model an energy: it predicts what it did, and then learns to think."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from ebt_transformers import EBTForCausalLM, ebt_from_llama
from ebt_transformers.training import run_clm


SHAPE = {
    "vocab_size": 41,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
IDS = torch.randint(41, (2, 7), generator=torch.Generator().manual_seed(0))


def llama(**overrides: Any) -> LlamaForCausalLM:
    """A small random one, not near zero."""
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, "initializer_range": 0.2, **overrides})).eval()


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"tie_word_embeddings": True},
        {"head_dim": 16, "rms_norm_eps": 1e-3},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "hidden_act": "gelu"},
    ],
    ids=["plain", "tied", "wide-heads", "other-rotary"],
)
def test_a_model_with_an_energy_predicts_what_it_did_before(overrides: dict[str, Any]) -> None:
    model = llama(**overrides)
    ebt = ebt_from_llama(model)
    assert not ebt.training and ebt.config.tie_word_embeddings == model.config.tie_word_embeddings
    with torch.no_grad():
        expected = model(IDS).logits
        # the energy is flat until it is trained: thinking changes nothing either
        for steps in (0, 1, 5):
            assert_close(ebt(IDS, thinking_steps=steps).logits, expected, rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(ebt.generate(IDS, thinking_steps=0, **options), model.generate(IDS, **options))


def test_its_weights_are_its_own() -> None:
    model = llama()
    ebt, before = ebt_from_llama(model), model.lm_head.weight.clone()
    with torch.no_grad():
        for parameter in ebt.parameters():
            parameter.add_(1.0)
    assert torch.equal(model.lm_head.weight, before)


def test_it_keeps_dtype_and_generation_config(tmp_path: Path) -> None:
    model = llama().to(torch.bfloat16)
    model.generation_config.update(max_new_tokens=3)
    ebt = ebt_from_llama(model, thinking_steps=4)
    assert ebt.dtype == torch.bfloat16 and ebt.step_size.value.dtype == torch.float32
    ebt.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, EBTForCausalLM) and loaded.config.thinking_steps == 4
    assert loaded.generate(IDS).shape == (2, 10)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(TypeError, match="LlamaForCausalLM, got MistralForCausalLM"):
        ebt_from_llama(MistralForCausalLM(MistralConfig(**SHAPE)))
    for name in ("attention_bias", "mlp_bias"):
        with pytest.raises(ValueError, match=f"{name}=True"):
            ebt_from_llama(llama(**{name: True}))
    with pytest.raises(ValueError, match="candidate_init, hidden_size: given by the model itself"):
        ebt_from_llama(llama(), hidden_size=64, candidate_init="zeros")


def test_the_script_teaches_a_twin_to_think(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("all the people all the time\n" * 300)
    shape = "hidden_size=16,intermediate_size=16,num_hidden_layers=1,num_attention_heads=2"
    common = [*("--train_file", str(tmp_path / "text.txt"), "--tokenizer_name", "tiny_shakespeare", "--use_cpu")]
    common += ["--block_size", "16", "--max_steps", "2", "--report_to", "none", "--disable_tqdm", "true"]
    run_clm.main([*common, "--output_dir", str(tmp_path / "twin"), "--twin", "--config_overrides", shape])
    further = [*common, "--model_name_or_path", str(tmp_path / "twin"), "--output_dir"]
    run_clm.main([*further, str(tmp_path / "ebt"), "--recipe", "proposal"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ebt")
    assert isinstance(model, EBTForCausalLM) and model.config.starts_at_prediction
    assert model.model.energy_head.weight.any()
    run_clm.main([*further, str(tmp_path / "plain")])
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), LlamaForCausalLM)
