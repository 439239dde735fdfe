"""What the denoising pipelines of transformers and of diffusers do alike: images of any size through a model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..configuration.thinking_ebt import ThinkingConfig
from ..modeling_ebt.latents import Autoencoder
from .image_tiles import Canvas, Tiling


HALF_RANGE = 127.5  # 0..255 to -1..1


@dataclass
class DenoisedImage:
    """
    One image after thinking, as the model returns it: on its own scale, not clipped, on the CPU.

    Args:
        image (`torch.FloatTensor` of shape `(C, H, W)`): denoised.
        steps_taken (`int`): thinking steps that moved it; of tiles the most.
        energies (`torch.FloatTensor` of shape `(K + 1,)`, *optional*): before every step and after the last; of tiles
            the mean.
        trajectory (`torch.FloatTensor` of shape `(K + 1, C, H, W)`, *optional*): the start and the image after every
            step.
    """

    image: Tensor
    steps_taken: int
    energies: Tensor | None
    trajectory: Tensor | None


def check_denoiser(model: PreTrainedModel) -> None:
    """Raises a `TypeError` for a model that does not denoise images by descent."""
    # by what it has, not by its class: code from the Hub, and adapters, bring classes of their own
    if not hasattr(model, "energy") or not hasattr(model.config, "patch_size"):
        raise TypeError(
            f"{type(model).__name__} does not denoise images by descending an energy. Give an EBTForImageDenoising."
        )


def denoise(
    model: PreTrainedModel,
    images: Sequence[Tensor],
    thinking: ThinkingConfig | None = None,
    tiling: Tiling | None = None,
    batch_size: int = 1,
    output_energies: bool = False,
    output_trajectory: bool = False,
    progress: Any | None = None,
) -> list[DenoisedImage]:
    """
    Denoises images of any sizes; those larger than a tile in overlapping tiles.

    Args:
        model ([`EBTForImageDenoising`]): the model, in evaluation mode.
        images (sequence of `torch.FloatTensor` of shape `(C, H, W)`): noisy images on the model's scale.
        thinking ([`ThinkingConfig`], *optional*): how to think.
        tiling ([`Tiling`], *optional*): how large images are cut; whole by default.
        batch_size (`int`, *optional*, defaults to 1): images or tiles that go through the model at once.
        output_energies, output_trajectory (`bool`, *optional*): return those, too.
        progress (`Callable`, *optional*): given the list of batches, returns it with a progress bar.

    Returns:
        `list[DenoisedImage]`, one for each image.
    """
    by_shape: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for number, image in enumerate(images):
        height, width = image.shape[-2:]
        whole = [(0, 0, height, width)]
        for top, left, *shape in whole if tiling is None else tiling.places(height, width):
            by_shape.setdefault((shape[0], shape[1]), []).append((number, top, left))
    batches = [
        (shape, places[start : start + batch_size])
        for shape, places in by_shape.items()
        for start in range(0, len(places), batch_size)
    ]
    overlap = (0, 0) if tiling is None else tiling.overlap
    pictures = [Canvas(image.shape, overlap) for image in images]
    paths: list[Canvas | None] = [None] * len(images)
    energies: list[list[Tensor]] = [[] for _ in images]
    steps = [0] * len(images)
    for (height, width), places in batches if progress is None else progress(batches):
        tiles = [images[number][:, top : top + height, left : left + width] for number, top, left in places]
        output = model(
            torch.stack(tiles).to(model.device),
            thinking=thinking,
            output_energies=output_energies,
            output_trajectory=output_trajectory,
        )
        for row, (number, top, left) in enumerate(places):
            pictures[number].add(output.reconstruction[row].cpu(), top, left)
            steps[number] = max(steps[number], int(output.steps_taken[row]))
            if output_energies:
                energies[number].append(output.energies[row].cpu())
            if output_trajectory:
                states = output.trajectory[row].cpu()
                path = paths[number]
                if path is None:
                    path = paths[number] = Canvas((len(states), *images[number].shape), overlap)
                path.add(states, top, left)
    results = []
    for number, picture in enumerate(pictures):
        path, values = paths[number], energies[number]
        results.append(
            DenoisedImage(
                image=picture.picture(),
                steps_taken=steps[number],
                energies=torch.stack(values).mean(0) if values else None,
                trajectory=None if path is None else path.picture(),
            )
        )
    return results


def scale_for_noise(noise_std: float) -> float:
    r"""
    What brings a picture with noise on top to how the model saw noisy images in training.

    The model learned from `sqrt(a) x + sqrt(1 - a) n`; a photo is `x + s n` with `s = noise_std / 127.5`. Both are the
    same but for the factor `sqrt(a)` where `(1 - a) / a = s ** 2`, so where `sqrt(a) = 1 / sqrt(1 + s ** 2)`.

    Args:
        noise_std (`float`): standard deviation of the picture's noise, in units of 0..255.

    Raises:
        ValueError: for a number that is not finite or below 0.
    """
    if not isinstance(noise_std, (int, float)) or isinstance(noise_std, bool) or not 0 <= noise_std < math.inf:
        raise ValueError(f"`noise_std` must be a finite number of at least 0, in units of 0..255, got {noise_std!r}.")
    return 1 / math.sqrt(1 + (noise_std / HALF_RANGE) ** 2)


def check_noise_options(noise_std: float | None, level: float | None, vae: Any | None, level_name: str) -> None:
    """Raises a `ValueError` where the noise of a picture can have no meaning."""
    if noise_std is not None and level is not None:
        raise ValueError(f"`noise_std` is for noisy pictures, `{level_name}` for clean ones. Give one of them.")
    if noise_std is not None and vae is not None:
        raise ValueError(
            "`noise_std` is for models on pixels: what an autoencoder makes of a picture's noise is no scaled noise."
        )


def check_vae(vae: Autoencoder, config: Any) -> None:
    """Raises for an autoencoder that does not fit a model."""
    if config.vae_name_or_path is None:
        raise ValueError(
            "A `vae` was given, but the model works on pixels: its `config.vae_name_or_path` is None. Leave the `vae` "
            "out, or name the one the model was trained with in the config."
        )
    if vae.config.latent_channels != config.num_channels:
        raise ValueError(
            f"The autoencoder's latents have {vae.config.latent_channels} channels, the model takes "
            f"{config.num_channels}. Give the autoencoder the model was trained with."
        )


__all__ = [
    "DenoisedImage",
    "check_denoiser",
    "check_noise_options",
    "check_vae",
    "denoise",
    "scale_for_noise",
]
