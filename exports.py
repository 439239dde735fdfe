"""The public names of the package; importing this module registers every model with the Auto classes."""

from contextlib import suppress

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageToImage,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration import PRESETS, EBTConfig, EBTImageConfig, ThinkingConfig, transformer_pp_config
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
from .modeling_ebt.image_processing_ebt import EBTImageProcessor
from .pipelines.image_denoising import TASK, ImageDenoisingPipeline


AutoConfig.register(EBTConfig.model_type, EBTConfig, exist_ok=True)
AutoModel.register(EBTConfig, EBTModel, exist_ok=True)
AutoModelForCausalLM.register(EBTConfig, EBTForCausalLM, exist_ok=True)
EBTConfig.register_for_auto_class()
EBTModel.register_for_auto_class("AutoModel")
EBTForCausalLM.register_for_auto_class("AutoModelForCausalLM")

AutoConfig.register(EBTImageConfig.model_type, EBTImageConfig, exist_ok=True)
AutoModel.register(EBTImageConfig, EBTImageModel, exist_ok=True)
AutoModelForImageToImage.register(EBTImageConfig, EBTForImageDenoising, exist_ok=True)
EBTImageConfig.register_for_auto_class()
EBTImageModel.register_for_auto_class("AutoModel")
EBTForImageDenoising.register_for_auto_class("AutoModelForImageToImage")
EBTImageProcessor.register_for_auto_class("AutoImageProcessor")
with suppress(ImportError):  # transformers' own class needs pillow, and in some versions torchvision
    AutoImageProcessor.register(EBTImageConfig, image_processor_classes={"pil": EBTImageProcessor}, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(
    TASK, pipeline_class=ImageDenoisingPipeline, pt_model=AutoModelForImageToImage, type="image"
)

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
    "EBTModel",
    "EBTModelOutputWithPast",
    "ImageDenoisingPipeline",
    "ThinkingConfig",
    "transformer_pp_config",
]
