"""Pictures to latents and back, for models that work on the latents of a diffusers autoencoder."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor


if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def need_diffusers(what: str) -> None:
    """Raises an `ImportError` that names the extra, where diffusers is missing."""
    try:
        import diffusers  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{what} needs the library diffusers: pip install 'ebt-transformers[diffusers]'.") from error


def load_vae(name_or_path: str) -> "AutoencoderKL":
    """
    The autoencoder of a model on latents, in evaluation mode.

    Args:
        name_or_path (`str`): a folder or a Hub id, as `config.vae_name_or_path` names it.

    Raises:
        ImportError: without diffusers.
        OSError: if there is no such autoencoder.
    """
    need_diffusers(f"A model on latents (`vae_name_or_path={name_or_path!r}`)")
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(name_or_path).eval()


def vae_scale_factor(vae: "AutoencoderKL") -> int:
    """Pixels a side for each latent."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


@torch.no_grad()
def encode(vae: "AutoencoderKL", images: Tensor) -> Tensor:
    """Images `(B, 3, H, W)` on -1..1 to scaled latents `(B, C, h, w)` in float32: the posterior's mean."""
    mean = vae.encode(images.to(device=vae.device, dtype=vae.dtype)).latent_dist.mode()
    return mean.float() * vae.config.scaling_factor


@torch.no_grad()
def decode(vae: "AutoencoderKL", latents: Tensor) -> Tensor:
    """Scaled latents `(B, C, h, w)` to images `(B, 3, H, W)` in float32, about -1..1."""
    scaled = (latents / vae.config.scaling_factor).to(device=vae.device, dtype=vae.dtype)
    return vae.decode(scaled).sample.float()


__all__ = ["decode", "encode", "load_vae", "need_diffusers", "vae_scale_factor"]
