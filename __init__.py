"""
Energy-Based Transformers for the Hugging Face ecosystem.

Importing this package makes every model known to the Auto classes and pipelines of transformers. What a public name
needs is imported when the name is first used, so that the import itself takes no time (see `registration.py`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registration import register_when_imported


if TYPE_CHECKING:
    from .configuration import (
        PRESETS,
        EBTConfig,
        EBTImageConfig,
        EnergyTransformerConfig,
        ThinkingConfig,
        transformer_pp_config,
    )
    from .modeling_ebt import (
        EBTCausalLMOutputWithPast,
        EBTForCausalLM,
        EBTForImageDenoising,
        EBTGenerateOutput,
        EBTImageDenoisingOutput,
        EBTImageModel,
        EBTImageModelOutput,
        EBTModel,
        EBTModelOutputWithPast,
    )
    from .modeling_ebt.conversion_ebt import model_from_official, model_to_official
    from .modeling_ebt.image_processing_ebt import EBTImageProcessor
    from .modeling_ebt.upcycling_ebt import ebt_from_llama
    from .modeling_et import (
        EnergyTransformerClassifierOutput,
        EnergyTransformerCompletionOutput,
        EnergyTransformerForGraphClassification,
        EnergyTransformerForImageCompletion,
        EnergyTransformerForNodeClassification,
        EnergyTransformerModel,
        EnergyTransformerModelOutput,
    )
    from .modeling_et.conversion_et import energy_transformer_from_official, energy_transformer_to_official
    from .pipelines import (
        EnergyScoringPipeline,
        ImageCompletionPipeline,
        ImageDenoisingPipeline,
        generate_with_energies,
        perplexity_by_steps,
    )
    from .pipelines.diffusers_denoising import EBTDenoisingPipeline  # noqa: F401  public, but `import *` must not need diffusers
    from .training import (
        EBTImageTrainingArguments,
        EBTTrainer,
        EBTTrainingArguments,
        EnergyTransformerTrainingArguments,
        GraphCollator,
    )

__version__ = "0.1.0"

# where every public name lives
_HOMES = {
    ".configuration": (
        "PRESETS",
        "EBTConfig",
        "EBTImageConfig",
        "EnergyTransformerConfig",
        "ThinkingConfig",
        "transformer_pp_config",
    ),
    ".modeling_ebt": (
        "EBTCausalLMOutputWithPast",
        "EBTForCausalLM",
        "EBTForImageDenoising",
        "EBTGenerateOutput",
        "EBTImageDenoisingOutput",
        "EBTImageModel",
        "EBTImageModelOutput",
        "EBTModel",
        "EBTModelOutputWithPast",
    ),
    ".modeling_ebt.conversion_ebt": ("model_from_official", "model_to_official"),
    ".modeling_ebt.image_processing_ebt": ("EBTImageProcessor",),
    ".modeling_ebt.upcycling_ebt": ("ebt_from_llama",),
    ".modeling_et": (
        "EnergyTransformerClassifierOutput",
        "EnergyTransformerCompletionOutput",
        "EnergyTransformerForGraphClassification",
        "EnergyTransformerForImageCompletion",
        "EnergyTransformerForNodeClassification",
        "EnergyTransformerModel",
        "EnergyTransformerModelOutput",
    ),
    ".modeling_et.conversion_et": ("energy_transformer_from_official", "energy_transformer_to_official"),
    ".pipelines": (
        "EnergyScoringPipeline",
        "ImageCompletionPipeline",
        "ImageDenoisingPipeline",
        "generate_with_energies",
        "perplexity_by_steps",
    ),
    ".pipelines.diffusers_denoising": ("EBTDenoisingPipeline",),
    ".training": (
        "EBTImageTrainingArguments",
        "EBTTrainer",
        "EBTTrainingArguments",
        "EnergyTransformerTrainingArguments",
        "GraphCollator",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(import_module(_HOME_OF[name], __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})


register_when_imported()

__all__ = [
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
    "EBTImageTrainingArguments",
    "EBTModel",
    "EBTModelOutputWithPast",
    "EBTTrainer",
    "EBTTrainingArguments",
    "EnergyScoringPipeline",
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
    "ImageCompletionPipeline",
    "ImageDenoisingPipeline",
    "ThinkingConfig",
    "ebt_from_llama",
    "energy_transformer_from_official",
    "energy_transformer_to_official",
    "generate_with_energies",
    "model_from_official",
    "model_to_official",
    "perplexity_by_steps",
    "transformer_pp_config",
]
