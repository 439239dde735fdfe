"""Rows and a model for the tests of model cards and their measurements. Not a test."""

import torch

from ebt_transformers import EBTForImageDenoising, EBTImageConfig


VOCAB, LENGTH, SIDE = 1024, 12, 8


def text_rows(count: int = 6) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, VOCAB, (count, LENGTH), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[0, -4:] = -100
    return [{"input_ids": row, "labels": target} for row, target in zip(ids, labels, strict=True)]


def image_rows(count: int = 6) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(4)
    clean = torch.rand((count, 3, SIDE, SIDE), generator=generator) * 2 - 1
    noisy = clean + 0.3 * torch.randn(clean.shape, generator=generator)
    return [{"pixel_values": image, "labels": target} for image, target in zip(noisy, clean, strict=True)]


def tiny_image_model(**overrides: object) -> EBTForImageDenoising:
    torch.manual_seed(1)
    shape = {"image_size": SIDE, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = EBTForImageDenoising(EBTImageConfig(**{**shape, "step_size": 30.0, **overrides})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modulation" in name or "energy_head" in name:
                parameter.normal_(std=0.1)
    return model
