"""Pictures to latents and back, for models that work on the latents of a diffusers autoencoder."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor


Autoencoder = Any  # a diffusers `AutoencoderKL`, for the same reason not imported for its name


def need_diffusers(what: str) -> ModuleType:
    """The library diffusers; an `ImportError` that names the extra, where it is missing."""
    try:  # a plain import would make it a requirement of code a checkpoint carries
        import diffusers
    except ImportError as error:
        raise ImportError(f"{what} needs the library diffusers: pip install 'ebt-transformers[diffusers]'.") from error
    return diffusers


def load_vae(name_or_path: str) -> Autoencoder:
    """
    The autoencoder of a model on latents, in evaluation mode.

    Args:
        name_or_path (`str`): a folder or a Hub id, as `config.vae_name_or_path` names it.

    Raises:
        ImportError: without diffusers.
        OSError: if there is no such autoencoder.
    """
    diffusers = need_diffusers(f"A model on latents (`vae_name_or_path={name_or_path!r}`)")
    return diffusers.AutoencoderKL.from_pretrained(name_or_path).eval()


def vae_scale_factor(vae: Autoencoder | None) -> int:
    """Pixels a side for each latent; 1 without an autoencoder."""
    return 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)


def _shift(vae: Autoencoder) -> float:
    """Newer autoencoders have latents that are not centred at zero."""
    return vae.config.shift_factor or 0.0


@torch.no_grad()
def encode(vae: Autoencoder, images: Tensor) -> Tensor:
    """Images `(B, 3, H, W)` on -1..1 to scaled latents `(B, C, h, w)` in float32: the posterior's mean."""
    mean = vae.encode(images.to(device=vae.device, dtype=vae.dtype)).latent_dist.mode().float()
    return (mean - _shift(vae)) * vae.config.scaling_factor


@torch.no_grad()
def decode(vae: Autoencoder, latents: Tensor) -> Tensor:
    """Scaled latents `(B, C, h, w)` to images `(B, 3, H, W)` in float32, about -1..1."""
    unscaled = latents / vae.config.scaling_factor + _shift(vae)
    return vae.decode(unscaled.to(device=vae.device, dtype=vae.dtype)).sample.float()


__all__ = ["Autoencoder", "decode", "encode", "load_vae", "need_diffusers", "vae_scale_factor"]
