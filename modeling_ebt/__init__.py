"""What a model does: the descent, candidates, the two-stream transformer, generation, conversion."""

from .descent import DescentOutput, DescentStep, StopRules, descend
from .generation import EBTGenerateBeamOutput, EBTGenerateOutput
from .modeling_ebt import EBTForCausalLM, EBTModel, EBTPreTrainedModel
from .modeling_ebt_image import EBTForImageDenoising, EBTImageModel, EBTImagePreTrainedModel
from .outputs import (
    EBTCausalLMOutputWithPast,
    EBTContext,
    EBTImageDenoisingOutput,
    EBTImageModelOutput,
    EBTModelOutputWithPast,
)


__all__ = [
    "DescentOutput",
    "DescentStep",
    "EBTCausalLMOutputWithPast",
    "EBTContext",
    "EBTForCausalLM",
    "EBTForImageDenoising",
    "EBTGenerateBeamOutput",
    "EBTGenerateOutput",
    "EBTImageDenoisingOutput",
    "EBTImageModel",
    "EBTImageModelOutput",
    "EBTImagePreTrainedModel",
    "EBTModel",
    "EBTModelOutputWithPast",
    "EBTPreTrainedModel",
    "StopRules",
    "descend",
]
