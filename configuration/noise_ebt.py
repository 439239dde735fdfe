"""How much noise images get: the paper's schedule, as a diffusers scheduler."""

import math
from typing import Any


Scheduler = Any  # a diffusers `DDPMScheduler`; imported, it would be a requirement of code a checkpoint carries
SCHEDULE_STEPS = 1000  # all the way to pure noise (Ho et al. 2020)
BETA_START, BETA_END = 1e-4, 2e-2  # of the linear schedule with so many steps
DIFFUSION_STEPS = 100  # the paper's


def noise_scheduler(noise_level: float = 0.1, diffusion_steps: int = DIFFUSION_STEPS) -> tuple[Scheduler, int]:
    r"""
    The schedule of a noise level and the timestep at which images get that much noise (paper D.3 and the official
    code): a linear schedule of `diffusion_steps / noise_level` steps whose betas are scaled so that all of it always
    ends in pure noise, cut off after `diffusion_steps`. Needs `diffusers`.

    Args:
        noise_level (`float`, *optional*, defaults to 0.1): share of the whole way to pure noise [sigma], above 0 and
            at most 1. 0.1 keeps 0.947 of the image and adds noise of standard deviation 0.321 (on -1..1); 0.2 keeps
            0.812 and adds 0.583.
        diffusion_steps (`int`, *optional*, defaults to 100): steps up to that level.

    Returns:
        A `DDPMScheduler`, for its `add_noise(images, noise, timesteps)`, and the timestep (`int`) to give it.

    Raises:
        ValueError: for a level or a number of steps out of range.
        ImportError: without diffusers.

    Example:

    ```python
    >>> from ebt_transformers.configuration.noise_ebt import noise_scheduler

    >>> scheduler, timestep = noise_scheduler(0.1)
    >>> timestep, round(float(1 - scheduler.alphas_cumprod[timestep]) ** 0.5, 3)
    (99, 0.321)
    ```
    """
    if not 0 < noise_level <= 1:
        raise ValueError(f"`noise_level` must be above 0 and at most 1, got {noise_level}.")
    if diffusion_steps < 1:
        raise ValueError(f"`diffusion_steps` must be at least 1, got {diffusion_steps}.")
    try:
        from diffusers import DDPMScheduler
    except ImportError as error:
        raise ImportError(
            "The schedule of the noise needs the library diffusers: pip install 'ebt-transformers[diffusers]'."
        ) from error

    # the small addition undoes what 100 / 0.1 loses to rounding
    total = math.floor(diffusion_steps / noise_level + 1e-6)
    scale = SCHEDULE_STEPS / total
    if scale * BETA_END >= 1:
        raise ValueError(
            f"{diffusion_steps} steps to a level of {noise_level} are too few: the noise of one step would be all "
            "there is. Use more steps."
        )
    scheduler = DDPMScheduler(
        num_train_timesteps=total, beta_start=scale * BETA_START, beta_end=scale * BETA_END, beta_schedule="linear"
    )
    return scheduler, diffusion_steps - 1


__all__ = ["DIFFUSION_STEPS", "SCHEDULE_STEPS", "noise_scheduler"]
