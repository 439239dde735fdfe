"""The examples in public docstrings run and print what they say."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import ebt_transformers


FOLDERS = ("configuration", "metrics", "modeling_ebt", "pipelines", "web")
PACKAGE = Path(ebt_transformers.__file__).parent
MODULES = [
    f"ebt_transformers.{folder}.{module.name}"
    for folder in FOLDERS
    for module in pkgutil.iter_modules([str(PACKAGE / folder)])
]


class FencedExamples(doctest.DocTestParser):
    """Examples stand in fenced code blocks, as in every transformers docstring: the fence ends the last output."""

    def parse(self, string: str, name: str = "<string>") -> list[str | doctest.Example]:
        """The examples of a docstring."""
        lines = ["" if line.strip().startswith("```") else line for line in string.splitlines()]
        return super().parse("\n".join(lines), name)


@pytest.mark.parametrize("module_name", MODULES)
def test_examples_in_docstrings_run(module_name: str) -> None:
    module = importlib.import_module(module_name)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    finder, runner = doctest.DocTestFinder(parser=FencedExamples()), doctest.DocTestRunner(optionflags=flags)
    report: list[str] = []
    for test in finder.find(module, module_name):
        runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


@pytest.mark.parametrize(
    ("module_name", "owner"),
    [
        ("configuration.configuration_ebt", "EBTConfig"),
        ("configuration.configuration_ebt", "EBTConfig.from_preset"),
        ("configuration.thinking_ebt", "ThinkingConfig"),
        ("configuration.twins", "transformer_pp_config"),
        ("modeling_ebt.modeling_ebt", "EBTModel"),
        ("modeling_ebt.modeling_ebt", "EBTForCausalLM"),
        ("modeling_ebt.modeling_ebt", "EBTForCausalLM.energy"),
        ("modeling_ebt.modeling_ebt_image", "EBTForImageDenoising"),
        ("modeling_ebt.modeling_ebt_image", "EBTForImageDenoising.energy"),
        ("modeling_ebt.transformer_image", "EBTImageModel"),
        ("configuration.configuration_ebt_image", "EBTImageConfig"),
        ("configuration.noise_ebt", "noise_scheduler"),
        ("pipelines.energy_scoring", "EnergyScoringPipeline"),
        ("pipelines.image_denoising", "ImageDenoisingPipeline"),
        ("pipelines.diffusers_denoising", "EBTDenoisingPipeline"),
    ],
)
def test_public_entry_points_have_an_example(module_name: str, owner: str) -> None:
    value = importlib.import_module(f"ebt_transformers.{module_name}")
    for part in owner.split("."):
        value = getattr(value, part)
    examples = FencedExamples().get_examples(value.__doc__ or "")
    assert examples, f"{owner} has no example"
