"""Laws of adapters: they learn what the full weights would, survive saving, and merge into the same model."""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForImageToImage, PreTrainedModel, pipeline
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import ebt_transformers  # noqa: F401  registers the models


pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parent))  # tests are imported by path (see pyproject.toml)

from peft import AutoPeftModel, AutoPeftModelForCausalLM, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model  # noqa: E402
from peft_models import adapted, config_of, example, prediction, saved, tiny  # noqa: E402

from ebt_transformers.modeling_ebt.image_processing_ebt import EBTImageProcessor  # noqa: E402
from ebt_transformers.training.adapters import check_adapters, merge_adapter, register_with_peft  # noqa: E402


KINDS = ("text", "image")
METHODS = ("lora", "ia3")
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
# every conditioning, embedding, update rule, anchor and start; every kind of image model
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("text", {"step_conditioning": "none", "num_landscapes": 1, "thinking_steps": 2}),
    "time_embed": ("text", {"update": "residual"}),
    "time_embed-anchored": ("text", {"candidate_anchor": "token"}),
    "time_embed-proposal": ("text", {"candidate_init": "proposal", "update": "residual"}),
    "adaln-shared": ("text", {"step_conditioning": "adaln", "candidate_embedding": "shared"}),
    "adaln_zero": ("text", {"step_conditioning": "adaln_zero"}),
    "last-step": ("text", {"loss_on_steps": "last", "detach_between_steps": False}),
    "image": ("image", {}),
    "image-conditional": ("image", {"image_conditioning": "noisy_image", "num_landscapes": 2}),
}


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """States, energies, losses and norms are in float32 on purpose; here in float64, so that laws hold to the end."""

    def rms_norm(self: LlamaRMSNorm, hidden: Tensor) -> Tensor:
        return self.weight * hidden * (hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    monkeypatch.setattr(LlamaRMSNorm, "forward", rms_norm)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def backward(model: nn.Module) -> float:
    """Gradients of one training step; returns its loss."""
    model.train().zero_grad()
    torch.manual_seed(4)  # random starts
    loss = model(**example(model)).loss
    loss.backward()
    return loss.item()


def layers_of(model: PeftModel, has: str) -> dict[str, nn.Module]:
    """Adapted layers by their path in the base model."""
    base = model.get_base_model()
    return {path: layer for path, layer in base.named_modules() if len(getattr(layer, has, ()))}


# ---- second order ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(MODELS))
def test_lora_learns_by_the_gradient_of_the_full_weights(name: str, in_float64: None) -> None:
    kind, values = MODELS[name]
    linear = [path for path, layer in tiny(kind, **values).named_modules() if isinstance(layer, nn.Linear)]
    if values.get("candidate_embedding") == "shared":
        linear.remove("candidate_embedding")
    config = config_of("lora", kind, target_modules=linear)
    model, full = adapted(tiny(kind, **values).double(), config), tiny(kind, **values).double()
    layers = layers_of(model, "lora_A")
    assert any("q_proj" in path for path in layers) and any("energy_head" in path for path in layers)
    with torch.no_grad():
        for path, layer in layers.items():
            full.get_submodule(path).weight.add_(layer.get_delta_weight("default"))
    assert backward(model) == pytest.approx(backward(full), rel=1e-12)
    for path, layer in layers.items():
        weight = full.get_submodule(path).weight.grad
        down, up, scaling = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
        assert scaling == 2.0 and weight.abs().max() > 0
        assert_close(down.grad, scaling * up.t() @ weight, rtol=1e-9, atol=1e-12)
        assert_close(up.grad, scaling * weight @ down.t(), rtol=1e-9, atol=1e-12)
    frozen = [parameter for path, parameter in model.named_parameters() if "lora_" not in path]
    assert frozen and all(parameter.grad is None for parameter in frozen)


@pytest.mark.parametrize("name", ["adaln_zero", "image-conditional"])
def test_ia3_learns_by_the_gradient_of_the_full_weights(name: str, in_float64: None) -> None:
    kind, values = MODELS[name]
    model, full = adapted(tiny(kind, **values).double(), config_of("ia3", kind)), tiny(kind, **values).double()
    layers = layers_of(model, "ia3_l")
    assert len(layers) == 6  # keys (or queries), values and feed-forward of two layers
    for path, layer in layers.items():
        with torch.no_grad():
            full.get_submodule(path).weight.mul_(layer.ia3_l["default"])
            if full.get_submodule(path).bias is not None and not layer.is_feedforward:
                full.get_submodule(path).bias.mul_(layer.ia3_l["default"].flatten())
    assert backward(model) == pytest.approx(backward(full), rel=1e-12)
    for path, layer in layers.items():
        mine, factor = full.get_submodule(path), layer.ia3_l["default"]
        expected = (mine.weight.grad * layer.base_layer.weight).sum(0 if layer.is_feedforward else 1)
        if mine.bias is not None and not layer.is_feedforward:
            expected = expected + mine.bias.grad * layer.base_layer.bias
        assert_close(factor.grad.flatten(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)  # DoRA takes its norms for constants
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_an_adapter_is_the_slope_of_the_loss(kind: str, method: str, in_float64: None) -> None:
    # between steps that are not detached, or the objective is not what is differentiated
    base = tiny(kind, num_landscapes=2, thinking_steps=2, detach_between_steps=False).double()
    model = adapted(base, config_of(method, kind, modules_to_save=["step_size"]))
    backward(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    directions = [torch.randn_like(parameter) for parameter in trained]
    slope = sum((parameter.grad * way).sum().item() for parameter, way in zip(trained, directions, strict=True))
    losses = []
    for sign in (1, -2):
        with torch.no_grad():
            for parameter, way in zip(trained, directions, strict=True):
                parameter.add_(sign * 1e-7 * way)
        losses.append(backward(model))
    assert (losses[0] - losses[1]) / 2e-7 == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_activations_change_no_gradient_of_an_adapter(kind: str) -> None:
    found = []
    for recompute in (False, True):
        model = adapted(tiny(kind), config_of("lora", kind, lora_dropout=0.2, target_modules="all-linear"))
        if recompute:
            model.gradient_checkpointing_enable()
        backward(model)
        found.append({name: value.grad for name, value in model.named_parameters() if value.requires_grad})
    assert all(value.abs().sum() > 0 for value in found[0].values())
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-6)


# ---- what peft knows of our models -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "method", "expected"),
    [
        ("text", "lora", {"q_proj", "v_proj"}),
        ("text", "ia3", {"k_proj", "v_proj", "down_proj"}),
        ("image", "lora", {"q_proj", "v_proj"}),
        ("image", "ia3", {"q_proj", "k_proj", "fc2"}),
    ],
)
def test_peft_knows_the_layers_of_our_models(kind: str, method: str, expected: set[str]) -> None:
    model = adapted(tiny(kind), config_of(method, kind))
    assert model.peft_config["default"].target_modules == expected
    layers = layers_of(model, "lora_A" if method == "lora" else "ia3_l")
    assert {path.rpartition(".")[2] for path in layers} == expected
    if method == "ia3":
        assert {path.rpartition(".")[2] for path, layer in layers.items() if layer.is_feedforward} == expected & {
            "down_proj",
            "fc2",
        }


def test_registering_again_keeps_what_a_user_has_set(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.utils import constants

    table = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    monkeypatch.setitem(table, "ebt", ["o_proj"])
    register_with_peft()
    assert set(layers_of(get_peft_model(tiny("text"), config_of("lora", "text")), "lora_A")) == {
        f"model.layers.{index}.self_attn.o_proj" for index in range(2)
    }


@pytest.mark.parametrize("method", [*METHODS, "dora"])
@pytest.mark.parametrize("name", ["none", "adaln-shared", "time_embed-proposal", "image", "image-conditional"])
def test_an_adapter_of_all_linear_layers_merges_into_the_same_model(name: str, method: str, in_float64: None) -> None:
    kind, values = MODELS[name]
    options = {"feedforward_modules": []} if method == "ia3" else {}
    model = adapted(tiny(kind, **values).double(), config_of(method, kind, target_modules="all-linear", **options))
    assert "energy_head" in {
        path.rpartition(".")[2] for path in layers_of(model, "lora_A" if method != "ia3" else "ia3_l")
    }
    before = prediction(model, thinking_steps=3)
    assert (before - prediction(tiny(kind, **values).double(), thinking_steps=3)).abs().max() > 1e-2
    assert_close(prediction(model.merge_and_unload(), thinking_steps=3), before, **CLOSE)


@pytest.mark.parametrize("layer", ["candidate_embedding", "embed_tokens", "step_embeddings"])
@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "modules_to_save"])
def test_an_adapter_of_a_table_takes_part_in_thinking(layer: str, method: str, in_float64: None) -> None:
    if method == "ia3" and layer != "candidate_embedding":
        pytest.skip("IA3 of peft adapts no embeddings")
    options: dict[str, Any] = {"target_modules": [layer]}
    if method == "ia3":
        options["feedforward_modules"] = []
    if method == "modules_to_save":
        options = {"target_modules": ["q_proj"], "modules_to_save": [layer]}
    base = tiny("text", step_conditioning="adaln").double()
    model = adapted(base, config_of("lora" if method == "modules_to_save" else method, "text", **options))
    before, ids = prediction(model, thinking_steps=3), example(model)["input_ids"]
    energy = model.energy(ids[:, :-1], candidate_ids=ids[:, 1:])
    backward(model)
    trained = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in trained)
    with model.disable_adapter():
        assert (prediction(model, thinking_steps=3) - before).abs().max() > 1e-3
    merged = model.merge_and_unload()
    assert type(merged.candidate_embedding) is nn.Linear
    assert_close(prediction(merged, thinking_steps=3), before, **CLOSE)
    assert_close(merged.eval().energy(ids[:, :-1], candidate_ids=ids[:, 1:]), energy, **CLOSE)


@pytest.mark.parametrize("target", ["embed_tokens", "candidate_embedding"])
@pytest.mark.parametrize("how", ["lora", "tied lora", "modules_to_save"])
def test_an_adapter_of_half_a_shared_table_is_refused(target: str, how: str) -> None:
    options: dict[str, Any] = {"target_modules": [target], "ensure_weight_tying": how == "tied lora"}
    if how == "modules_to_save":
        options = {"target_modules": ["q_proj"], "modules_to_save": [target]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns, too
        model = get_peft_model(tiny("text", candidate_embedding="shared"), config_of("lora", "text", **options))
    with pytest.raises(ValueError, match="tokens and candidates share"):
        check_adapters(model)


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"trainable_token_indices": [1, 2]},
        {},
    ],
    ids=["whole table", "some tokens", "other layers"],
)
def test_a_shared_table_stays_one_table(tmp_path: Path, options: dict[str, Any], in_float64: None) -> None:
    config = config_of("lora", "text", target_modules=["q_proj"], **options)
    model = adapted(tiny("text", candidate_embedding="shared").double(), config)
    check_adapters(model)
    before = prediction(model, thinking_steps=3)
    model.merge_and_unload().save_pretrained(tmp_path)
    assert_close(prediction(AutoModelForCausalLM.from_pretrained(tmp_path), thinking_steps=3), before, **CLOSE)


# ---- saving, loading, merging ----------------------------------------------------------------------------------


def loaders(kind: str, base: Path, adapter: Path) -> dict[str, Callable[[], nn.Module]]:
    """Every way to load a saved adapter."""
    if kind == "text":
        return {
            "peft": lambda: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter),
            "auto peft": lambda: AutoPeftModelForCausalLM.from_pretrained(adapter),
            "transformers": lambda: AutoModelForCausalLM.from_pretrained(adapter),
        }
    allowed = ["ebt_transformers.modeling_ebt.modeling_ebt_image"]  # peft asks before it imports for an adapter
    return {
        "peft": lambda: PeftModel.from_pretrained(AutoModelForImageToImage.from_pretrained(base), adapter),
        "auto peft": lambda: AutoPeftModel.from_pretrained(adapter, import_allowlist=allowed),
        "transformers": lambda: AutoModelForImageToImage.from_pretrained(adapter),
        "pipeline": lambda: pipeline("image-denoising", model=str(adapter)).model,
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_gives_the_same_predictions_however_it_is_loaded(
    tmp_path: Path, kind: str, method: str
) -> None:
    base, folder = tmp_path / "base", tmp_path / "adapter"
    model = adapted(saved(kind, base), config_of(method, kind, modules_to_save=["step_size"]))
    model.save_pretrained(folder)
    if kind == "image":
        EBTImageProcessor.from_model_config(model.config).save_pretrained(folder)
    expected, step_size = prediction(model, thinking_steps=3), float(model.step_size())
    assert step_size != 3.0 if kind == "text" else step_size != 2.0
    for way, load in loaders(kind, base, folder).items():
        found = load()
        assert torch.equal(prediction(found, thinking_steps=3), expected), way
        assert float(found.step_size()) == step_size, way
    assert not list(folder.glob("model*.safetensors"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_adapter_gives_the_same_predictions(tmp_path: Path, kind: str, method: str, in_float64: None) -> None:
    model = adapted(tiny(kind).double(), config_of(method, kind, modules_to_save=["step_size"]))
    expected, step_size = prediction(model, thinking_steps=3), float(model.step_size())
    merged: PreTrainedModel = merge_adapter(model)
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in tiny(kind).named_parameters()}
    merged.save_pretrained(tmp_path)
    assert_close(prediction(type(merged).from_pretrained(tmp_path), thinking_steps=3), expected, **CLOSE)
    assert float(merged.step_size()) == step_size


def test_an_adapted_model_generates_as_its_merged_one(in_float64: None) -> None:
    model = adapted(tiny("text").double(), config_of("lora", "text", target_modules="all-linear"))
    options = {"max_new_tokens": 6, "thinking_steps": 3, "thinking_candidates": 2, "do_sample": False}
    options |= {"output_energies": True, "return_dict_in_generate": True}
    ids = example(model)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    own = model.generate(input_ids=ids, attention_mask=mask, **options)
    merged = model.merge_and_unload().generate(input_ids=ids, attention_mask=mask, **options)
    assert own.energies.shape == (2, 6, 4)
    assert torch.equal(own.sequences, merged.sequences)
    assert_close(own.energies, merged.energies, **CLOSE)


def test_a_switched_off_adapter_leaves_the_model_as_it_was() -> None:
    model = adapted(tiny("text"), config_of("lora", "text", modules_to_save=["step_size"]))
    with model.disable_adapter():
        assert torch.equal(prediction(model), prediction(tiny("text")))
    assert not torch.equal(prediction(model), prediction(tiny("text")))


def test_two_adapters_of_one_model_are_told_apart() -> None:
    model = adapted(tiny("text"), config_of("lora", "text"))
    first = prediction(model)
    model.add_adapter("second", LoraConfig(r=2, init_lora_weights=False))
    model.set_adapter("second")
    second: Tensor = prediction(model)
    model.set_adapter("default")
    assert torch.equal(prediction(model), first) and not torch.equal(first, second)


def test_tuned_prompts_learn_and_generate_with_and_without_the_cache() -> None:
    model = get_peft_model(tiny("text"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    backward(model)
    (prompt,) = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert prompt.grad.abs().sum() > 0
    options = {"max_new_tokens": 5, "do_sample": False, "thinking_steps": 2}
    ids = example(model)["input_ids"]
    cached, anew = (model.eval().generate(input_ids=ids, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached, anew)
