"""The public names of the package; importing this module registers every model with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration import PRESETS, EBTConfig, ThinkingConfig, transformer_pp_config
from .modeling_ebt import (
    EBTCausalLMOutputWithPast,
    EBTForCausalLM,
    EBTGenerateOutput,
    EBTModel,
    EBTModelOutputWithPast,
)


AutoConfig.register(EBTConfig.model_type, EBTConfig, exist_ok=True)
AutoModel.register(EBTConfig, EBTModel, exist_ok=True)
AutoModelForCausalLM.register(EBTConfig, EBTForCausalLM, exist_ok=True)
EBTConfig.register_for_auto_class()
EBTModel.register_for_auto_class("AutoModel")
EBTForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "PRESETS",
    "EBTCausalLMOutputWithPast",
    "EBTConfig",
    "EBTForCausalLM",
    "EBTGenerateOutput",
    "EBTModel",
    "EBTModelOutputWithPast",
    "ThinkingConfig",
    "transformer_pp_config",
]
