"""Tiny models with adapters, for the tests of adapters: every way into them is random and away from its flat start."""

from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from ebt_transformers import EBTConfig, EBTForCausalLM, EBTForImageDenoising, EBTImageConfig


TEXT: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "step_size": 3.0,
}
IMAGE: dict[str, Any] = {
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "step_size": 2.0,
    "thinking_steps": 2,
}


def tiny(kind: str, **overrides: Any) -> PreTrainedModel:
    """A tiny model of `kind` "text" or "image" in evaluation mode, the same for the same arguments."""
    torch.manual_seed(1)
    if kind == "text":
        model = EBTForCausalLM(EBTConfig(**{**TEXT, **overrides})).eval()
    else:
        model = EBTForImageDenoising(EBTImageConfig(**{**IMAGE, **overrides})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modulation" in name or "energy_head" in name or name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model


def saved(kind: str, folder: Path, **overrides: Any) -> PreTrainedModel:
    """A tiny model that was loaded from a folder, as a model to adapt is."""
    tiny(kind, **overrides).save_pretrained(folder)
    return (EBTForCausalLM if kind == "text" else EBTForImageDenoising).from_pretrained(folder)


def config_of(method: str, kind: str, **options: Any) -> LoraConfig | IA3Config:
    """A peft config that names no layers: peft has to know them."""
    options["task_type"] = "CAUSAL_LM" if kind == "text" else None
    if method == "ia3":
        return IA3Config(**options)
    return LoraConfig(**{"r": 3, "lora_alpha": 6, "use_dora": method == "dora", **options})


def adapted(model: PreTrainedModel, config: LoraConfig | IA3Config, amount: float = 0.1) -> PeftModel:
    """The model with an adapter that does something, in evaluation mode."""
    peft_model = get_peft_model(model, config)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(amount * torch.randn_like(parameter))
    return peft_model.eval()


def example(model: torch.nn.Module, rows: int = 2) -> dict[str, Tensor]:
    """Random input with labels that fits the model."""
    generator = torch.Generator().manual_seed(3)
    if hasattr(model.config, "vocab_size"):
        ids = torch.randint(0, model.config.vocab_size, (rows, 7), generator=generator)
        return {"input_ids": ids, "labels": ids}
    shape = (rows, model.config.num_channels, *model.config.height_and_width)
    clean = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
    noisy = clean + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    dtype = next(model.parameters()).dtype
    return {"pixel_values": noisy.to(dtype), "labels": clean.to(dtype)}


def prediction(model: torch.nn.Module, **options: Any) -> Tensor:
    """Logits or image, in evaluation mode."""
    inputs = {name: value for name, value in example(model).items() if name != "labels"}
    with torch.no_grad():
        output = model.eval()(**inputs, **options)
    return output.logits if "logits" in output else output.reconstruction
