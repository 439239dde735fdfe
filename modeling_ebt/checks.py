"""Checks of what a user hands in, and the way out of inference mode."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache


LARGEST_IMAGE_VALUE = 20.0  # six standard deviations of the noisiest image or latent, and far below 255


def check_token_ids(token_ids: Tensor, vocab_size: int, name: str = "input_ids") -> None:
    """Raises for an empty batch or sequence and for ids outside the vocabulary."""
    if token_ids.dim() < 2 or token_ids.numel() == 0:
        raise ValueError(
            f"`{name}` must be a non-empty (rows, tokens) tensor, got shape {tuple(token_ids.shape)}. A prompt needs "
            "at least one token; use the tokenizer's bos token for an empty one."
        )
    if token_ids.device.type == "meta" or torch.compiler.is_compiling():
        return
    lowest, highest = (int(value) for value in torch.aminmax(token_ids))
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"`{name}` must be between 0 and {vocab_size - 1} (the vocabulary has {vocab_size} tokens), got "
            f"{lowest if lowest < 0 else highest}. Is the tokenizer the model's own?"
        )


def check_length(batch: int, length: int, past: int, maximum: int) -> None:
    """Raises for empty input and for a context longer than the model was made for."""
    if batch == 0 or length == 0:
        raise ValueError(f"The input is empty: {batch} row(s) of {length} token(s).")
    if past + length > maximum:
        raise ValueError(
            f"The context has {past + length} tokens, the model takes at most {maximum} "
            "(`config.max_position_embeddings`). Shorten the input or generate fewer tokens."
        )


def check_attention_mask(attention_mask: Tensor | None, batch: int, length: int, past: int, columns: int) -> None:
    """Raises for a mask of the wrong shape and for rows without a single token."""
    if attention_mask is None:
        return
    shape, total = tuple(attention_mask.shape), past + length
    if attention_mask.dim() == 4:
        if shape[0] not in (1, batch) or shape[1:3] != (1, length) or shape[3] < columns:
            raise ValueError(
                f"A 4D `attention_mask` must have shape ({batch}, 1, {length}, {columns}): rows, 1, new tokens, all "
                f"tokens; got {shape}."
            )
        return
    if shape != (batch, total):
        raise ValueError(f"`attention_mask` must have shape ({batch}, {total}), cached tokens included, got {shape}.")
    if attention_mask.device.type == "meta" or torch.compiler.is_compiling():
        return
    empty = (~attention_mask.bool().any(-1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"Row(s) {empty} of `attention_mask` are all zero: every row needs at least one token.")


def check_position_ids(position_ids: Tensor | None, batch: int, length: int) -> None:
    """Raises for positions of another shape than the new tokens."""
    if position_ids is not None and tuple(position_ids.shape) not in ((batch, length), (1, length)):
        raise ValueError(f"`position_ids` must have shape ({batch}, {length}), got {tuple(position_ids.shape)}.")


def check_labels(labels: Tensor, shape: tuple[int, ...], vocab_size: int) -> None:
    """Raises for labels of another shape than the logits' positions, and for ids outside the vocabulary."""
    if tuple(labels.shape) != tuple(shape):
        raise ValueError(
            f"`labels` must have shape {tuple(shape)}, one for each position with logits, got {tuple(labels.shape)}."
        )
    if labels.device.type == "meta" or torch.compiler.is_compiling():
        return
    highest = int(labels.max())
    if highest >= vocab_size:
        raise ValueError(f"`labels` must be below the vocabulary size {vocab_size} (or -100), got {highest}.")


def check_images(images: Tensor, channels: int, patch_size: int) -> None:
    """Raises for images that are no non-empty (B, C, H, W) floats, of other channels, or not cut evenly by patches."""
    shape = tuple(images.shape)
    if images.dim() != 4 or images.numel() == 0:
        raise ValueError(
            f"Images must be a non-empty tensor (images, channels, height, width), got shape {shape}. A single image "
            "needs a first dimension of 1."
        )
    if not images.is_floating_point():
        raise ValueError(
            f"Images must be floating point numbers, got {images.dtype}. The image processor scales 0..255 to -1..1."
        )
    if shape[1] != channels:
        raise ValueError(f"The model takes images of {channels} channel(s), got {shape[1]} (shape {shape}).")
    if shape[2] % patch_size or shape[3] % patch_size:
        raise ValueError(
            f"Height and width must be multiples of the patch size {patch_size}, got {shape[2]} x {shape[3]}. Resize, "
            "crop or pad the images."
        )


def check_image_values(images: Tensor) -> None:
    """Raises for values that are not finite, or so large that the images cannot have been scaled."""
    if images.device.type == "meta" or torch.compiler.is_compiling():
        return
    lowest, highest = (float(value) for value in torch.aminmax(images.detach()))
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise ValueError("The images hold values that are not finite (NaN or infinity).")
    largest = max(-lowest, highest)
    if largest > LARGEST_IMAGE_VALUE:
        raise ValueError(
            f"The images hold values up to {largest:g}; the model takes images scaled to -1..1 (before the noise). "
            "Use the image processor, or `images / 127.5 - 1` for 0..255."
        )


def check_energies(energies: Tensor, step_size: Tensor | float) -> None:
    """Raises for energies that are not finite."""
    if not bool(torch.isfinite(energies).all()):
        size = float(torch.as_tensor(step_size).flatten()[0])
        raise ValueError(
            "The energy is not finite (NaN or infinity). The weights are broken, or the step size "
            f"({size:g}) is far too large: try a smaller `thinking_step_size_scale`."
        )


def _to_normal(value: Any) -> Any:
    """Copies of tensors born in inference mode; autograd cannot use those."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, Cache):
        for layer in value.layers:
            for name, attribute in list(vars(layer).items()):
                if isinstance(attribute, Tensor) and attribute.is_inference():
                    setattr(layer, name, attribute.clone())
        return value
    return value


def outside_inference_mode(method: Callable) -> Callable:
    """Runs a method under `no_grad` when called in `torch.inference_mode()`: the descent needs input gradients."""

    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return method(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return method(*map(_to_normal, args), **{name: _to_normal(value) for name, value in kwargs.items()})

    return wrapper


__all__ = [
    "check_attention_mask",
    "check_energies",
    "check_image_values",
    "check_images",
    "check_labels",
    "check_length",
    "check_position_ids",
    "check_token_ids",
    "outside_inference_mode",
]
