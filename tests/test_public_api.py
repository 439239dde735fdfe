"""Laws of the public names: what a user may import, and that transformers knows the models after one import."""

import inspect
import subprocess
import sys

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import ebt_transformers
from ebt_transformers import EBTConfig, EBTForCausalLM, EBTModel, configuration, modeling_ebt


# names users rely on: removing one is a breaking change
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
    "ImageCompletionPipeline",
    "ImageDenoisingPipeline",
    "ThinkingConfig",
    "transformer_pp_config",
    "EBTTrainer",
    "EnergyScoringPipeline",
    "EBTImageTrainingArguments",
    "EBTTrainingArguments",
    "ebt_from_llama",
    "energy_transformer_from_official",
    "energy_transformer_to_official",
    "generate_with_energies",
    "model_from_official",
    "model_to_official",
    "perplexity_by_steps",
    "EnergyTransformerClassifierOutput",
    "EnergyTransformerCompletionOutput",
    "EnergyTransformerConfig",
    "EnergyTransformerForGraphClassification",
    "EnergyTransformerForImageCompletion",
    "EnergyTransformerForNodeClassification",
    "EnergyTransformerModel",
    "EnergyTransformerModelOutput",
    "EnergyTransformerTrainingArguments",
    "GraphCollator",
}
NOT_BY_STAR = {"EBTDenoisingPipeline"}  # needs diffusers
# what may be imported first; transformers imports its registries in the middle of some of these
FIRST = [
    "from transformers import LlamaForCausalLM",
    pytest.param("", marks=pytest.mark.slow),
    pytest.param("from ebt_transformers import EBTForCausalLM", marks=pytest.mark.slow),
    pytest.param("from ebt_transformers import EBTImageProcessor", marks=pytest.mark.slow),
    pytest.param("from ebt_transformers import *", marks=pytest.mark.slow),
    pytest.param("from transformers import pipeline", marks=pytest.mark.slow),
    pytest.param("from transformers import Trainer", marks=pytest.mark.slow),
    pytest.param("import transformers.modeling_utils", marks=pytest.mark.slow),
    pytest.param("from transformers import AutoImageProcessor", marks=pytest.mark.slow),
]
REGISTERED = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageToImage
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.pipelines import PIPELINE_REGISTRY
import ebt_transformers as ours

assert type(AutoConfig.for_model("ebt")) is ours.EBTConfig
assert type(AutoConfig.for_model("ebt_image")) is ours.EBTImageConfig
assert AutoModel._model_mapping[ours.EBTConfig] is ours.EBTModel
assert AutoModelForCausalLM._model_mapping[ours.EBTConfig] is ours.EBTForCausalLM
assert AutoModel._model_mapping[ours.EBTImageConfig] is ours.EBTImageModel
assert AutoModelForImageToImage._model_mapping[ours.EBTImageConfig] is ours.EBTForImageDenoising
assert ours.EBTForCausalLM in AutoModelForCausalLM._model_mapping.values()
assert ours.EBTImageConfig in IMAGE_PROCESSOR_MAPPING
assert ours.EnergyTransformerConfig in IMAGE_PROCESSOR_MAPPING
assert PIPELINE_REGISTRY.supported_tasks["image-completion"]["impl"] is ours.ImageCompletionPipeline
assert PIPELINE_REGISTRY.supported_tasks["image-denoising"]["impl"] is ours.ImageDenoisingPipeline
assert PIPELINE_REGISTRY.supported_tasks["energy-scoring"]["impl"] is ours.EnergyScoringPipeline
"""


def run(code: str, env: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)


@pytest.mark.parametrize("order", ["package first", "package last"])
@pytest.mark.parametrize("first", FIRST)
def test_everything_is_registered_whatever_is_imported_first(
    first: str, order: str, subprocess_env: dict[str, str]
) -> None:
    lines = ["import ebt_transformers", first]
    done = run("\n".join([*(lines if order == "package first" else lines[::-1]), REGISTERED]), subprocess_env)
    assert (done.returncode, done.stderr) == (0, "")


def test_importing_the_package_imports_neither_torch_nor_transformers(subprocess_env: dict[str, str]) -> None:
    names = "('torch', 'transformers', 'numpy', 'diffusers', 'datasets')"
    done = run(f"import sys, ebt_transformers\nprint([n for n in {names} if n in sys.modules])", subprocess_env)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("name", sorted(PROMISED | NOT_BY_STAR))
def test_public_names_are_there_and_documented(name: str) -> None:
    assert name in dir(ebt_transformers)
    assert inspect.getdoc(getattr(ebt_transformers, name))


def test_an_unknown_name_raises() -> None:
    with pytest.raises(AttributeError, match="EBTTrainr"):
        _ = ebt_transformers.EBTTrainr


def test_promised_names_are_there() -> None:
    assert set(ebt_transformers.__all__) == PROMISED
    assert set(ebt_transformers._HOME_OF) == PROMISED | NOT_BY_STAR
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
    done = run(code, subprocess_env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_package_does_without_the_optional_libraries(subprocess_env: dict[str, str]) -> None:
    optional = ("datasets", "accelerate", "matplotlib", "PIL", "peft", "evaluate", "diffusers")
    code = (
        f"import sys\nfor name in {optional!r}:\n    sys.modules[name] = None\n"
        "import ebt_transformers as e, torch\n"
        "m = e.EBTForCausalLM(e.EBTConfig(vocab_size=9, hidden_size=8, num_attention_heads=2, num_hidden_layers=1))\n"
        "print(m.generate(torch.tensor([[1, 2]]), max_new_tokens=2, do_sample=False).shape)"
    )
    done = run(code, subprocess_env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch.Size([1, 4])"
