"""
How a picture was denoised, as data: everything the tab "Denoise" of the web demonstration shows.

Shapes: ``C`` channels, ``H x W`` pixels, ``K`` thinking steps.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..assets import example_picture_path
from ..configuration.noise_ebt import noise_scheduler
from ..demo_image import BATCH_SIZE, clean_tensor, psnr, read_picture


if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

STRIDE = 8  # pixels between the tiles that a target energy is learned from


@dataclass(frozen=True)
class PictureWalk:
    """
    The descent of one picture.

    Args:
        pictures (`list[Tensor]`): `(C, H, W)` on 0..1: the noisy picture, then the picture after every step.
        energies (`list[float]`): before every step and after the last (K + 1); of a picture in tiles their mean.
        psnrs (`list[float]`): of those pictures to the clean one, in dB.
        steps_taken (`int`): steps that moved it; of tiles the most.
    """

    pictures: list[Tensor]
    energies: list[float]
    psnrs: list[float]
    steps_taken: int


def watch_picture(
    denoiser: Any,
    picture: "PILImage",
    level: float,
    steps: int,
    target_energy: float | None = None,
    seed: int = 0,
) -> PictureWalk:
    """
    Adds noise to a clean picture and denoises it, keeping every step.

    Args:
        denoiser ([`ImageDenoisingPipeline`]): the model.
        picture (`PIL.Image.Image`): the clean picture.
        level (`float`): noise, as a share of the way to pure noise, above 0 and at most 1.
        steps (`int`): thinking steps.
        target_energy (`float`, *optional*): every tile stops once its energy is at most this; by default all take all
            steps.
        seed (`int`, *optional*, defaults to 0): of the noise.

    Raises:
        ValueError: for values out of range.
        ImportError: without diffusers, whose noise this is.

    Example:

    ```python
    >>> from ebt_transformers.assets import example_picture_path
    >>> from ebt_transformers.demo_image import load_denoiser, read_picture
    >>> from ebt_transformers.web.denoising import watch_picture

    >>> walk = watch_picture(load_denoiser(), read_picture(example_picture_path()), level=0.2, steps=3)
    >>> len(walk.pictures), walk.psnrs[-1] > walk.psnrs[0]
    (4, True)
    ```
    """
    result = denoiser(
        picture,
        thinking_steps=steps,
        thinking_target_energy=target_energy,
        add_noise_level=level,
        noise_seed=seed,
        output_energies=True,
        output_trajectory=True,
        output_type="pt",
        batch_size=BATCH_SIZE,
    )
    clean = clean_tensor(denoiser, picture)
    pictures = list(result["trajectory"])
    return PictureWalk(pictures, result["energies"], [psnr(one, clean) for one in pictures], result["steps_taken"])


def learn_target_energy(denoiser: Any, level: float, source: Path | None = None) -> float:
    """
    A target energy for `watch_picture`: what noisy tiles of an example picture come down to
    ([`EBTForImageDenoising.suggest_target_energy`]).

    Args:
        denoiser ([`ImageDenoisingPipeline`]): the model, on pixels.
        level (`float`): the noise of its training.
        source (`Path`, *optional*): the picture; by default the embedded one.

    Raises:
        ValueError: for a model on latents, and a level out of range.
    """
    model = denoiser.model
    if model.config.vae_name_or_path is not None:
        raise ValueError("A target energy can be learned here for models on pixels only: this one works on latents.")
    clean = 2 * clean_tensor(denoiser, read_picture(source or example_picture_path())) - 1
    height, width = model.config.height_and_width
    tiles = clean.unfold(1, height, STRIDE).unfold(2, width, STRIDE).flatten(1, 2).transpose(0, 1)
    scheduler, timestep = noise_scheduler(level)
    noise = torch.randn(tiles.shape, generator=torch.Generator().manual_seed(0))
    noisy = scheduler.add_noise(tiles, noise, torch.full((len(tiles),), timestep))
    return model.suggest_target_energy(noisy.to(model.device))


__all__ = ["PictureWalk", "learn_target_energy", "watch_picture"]
