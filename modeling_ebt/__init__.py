"""What a model does: the descent, candidates, the two-stream transformer, generation, conversion."""

from .descent import DescentOutput, DescentStep, descend
from .generation import EBTGenerateBeamOutput, EBTGenerateOutput
from .modeling_ebt import EBTForCausalLM, EBTModel, EBTPreTrainedModel
from .outputs import EBTCausalLMOutputWithPast, EBTContext, EBTModelOutputWithPast


__all__ = [
    "DescentOutput",
    "DescentStep",
    "EBTCausalLMOutputWithPast",
    "EBTContext",
    "EBTForCausalLM",
    "EBTGenerateBeamOutput",
    "EBTGenerateOutput",
    "EBTModel",
    "EBTModelOutputWithPast",
    "EBTPreTrainedModel",
    "descend",
]
