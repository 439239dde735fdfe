"""Laws of the public names: what a user may import, and that transformers knows the models after one import."""

import inspect
import subprocess
import sys

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import ebt_transformers
from ebt_transformers import EBTConfig, EBTForCausalLM, EBTModel, configuration, modeling_ebt


# names users rely on: adding is free, removing is a breaking change
PROMISED = {
    "PRESETS",
    "EBTCausalLMOutputWithPast",
    "EBTConfig",
    "EBTForCausalLM",
    "EBTForImageDenoising",
    "EBTGenerateOutput",
    "EBTImageConfig",
    "EBTImageDenoisingOutput",
    "EBTImageModel",
    "EBTImageModelOutput",
    "EBTImageProcessor",
    "EBTModel",
    "EBTModelOutputWithPast",
    "ImageDenoisingPipeline",
    "ThinkingConfig",
    "transformer_pp_config",
}


# promised too, but imported on first use
LATER = {
    "EBTDenoisingPipeline",
    "EBTTrainer",
    "EBTImageTrainingArguments",
    "EBTTrainingArguments",
    "generate_with_energies",
    "model_from_official",
    "model_to_official",
    "perplexity_by_steps",
}


@pytest.mark.parametrize("name", sorted(LATER))
def test_names_imported_on_first_use_are_there_and_documented(name: str) -> None:
    assert name in dir(ebt_transformers)
    assert inspect.getdoc(getattr(ebt_transformers, name))


def test_an_unknown_name_raises() -> None:
    with pytest.raises(AttributeError, match="EBTTrainr"):
        _ = ebt_transformers.EBTTrainr


def test_promised_names_are_there() -> None:
    assert set(ebt_transformers.__all__) >= PROMISED
    assert ebt_transformers.__version__


@pytest.mark.parametrize("module", [ebt_transformers, configuration, modeling_ebt], ids=lambda module: module.__name__)
def test_every_listed_name_exists_and_is_documented(module: object) -> None:
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{name} has no docstring"


@pytest.mark.parametrize("model_class", [EBTForCausalLM, EBTModel])
def test_every_public_method_says_what_it_does(model_class: type) -> None:
    for name, value in vars(model_class).items():
        if not name.startswith("_") and callable(value):
            assert inspect.getdoc(value), f"{model_class.__name__}.{name} has no docstring"


def test_the_auto_classes_make_the_models() -> None:
    config = AutoConfig.for_model("ebt", vocab_size=9, hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    assert type(config) is EBTConfig
    assert type(AutoModel.from_config(config)) is EBTModel
    assert type(AutoModelForCausalLM.from_config(config)) is EBTForCausalLM


def test_importing_prints_nothing_and_leaves_torch_s_settings_alone(subprocess_env: dict[str, str]) -> None:
    code = (
        "import torch; before = (torch.get_rng_state().sum(), torch.get_default_dtype(), torch.is_grad_enabled());"
        "import ebt_transformers;"
        "assert before == (torch.get_rng_state().sum(), torch.get_default_dtype(), torch.is_grad_enabled())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=subprocess_env, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_package_does_without_the_optional_libraries(subprocess_env: dict[str, str]) -> None:
    optional = ("datasets", "accelerate", "matplotlib", "PIL", "peft", "evaluate", "diffusers")
    code = (
        f"import sys\nfor name in {optional!r}:\n    sys.modules[name] = None\n"
        "import ebt_transformers as e, torch\n"
        "m = e.EBTForCausalLM(e.EBTConfig(vocab_size=9, hidden_size=8, num_attention_heads=2, num_hidden_layers=1))\n"
        "print(m.generate(torch.tensor([[1, 2]]), max_new_tokens=2, do_sample=False).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=subprocess_env, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch.Size([1, 4])"
