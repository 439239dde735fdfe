"""
The Diffusion Transformer an image EBT is compared with (paper 4.3): the same size, trained to predict the noise on the
first part of a diffusion schedule, denoising by DDIM. It is diffusers' `DiTTransformer2DModel`, unconditional.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from ..configuration import EBTImageConfig
from ..configuration.noise_ebt import SCHEDULE_STEPS, noise_scheduler
from ..configuration.twins import dit_twin_config


if TYPE_CHECKING:
    from diffusers import DDPMScheduler, DiTTransformer2DModel

PAPER_TIMESTEPS = 100


def new_dit(config: EBTImageConfig, **overrides: Any) -> "DiTTransformer2DModel":
    """
    A new twin of an image EBT, initialised as in the DiT paper (diffusers leaves PyTorch's defaults): every block is
    the identity and the output zero.

    Args:
        config ([`EBTImageConfig`]): gives the shape.
        overrides: as in [`dit_twin_config`].
    """
    from diffusers import DiTTransformer2DModel

    dit = DiTTransformer2DModel(**dit_twin_config(config, **overrides))
    for module in dit.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight.flatten(1) if module.weight.dim() > 2 else module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for block in dit.transformer_blocks:
        nn.init.normal_(block.norm1.emb.timestep_embedder.linear_1.weight, std=0.02)
        nn.init.normal_(block.norm1.emb.timestep_embedder.linear_2.weight, std=0.02)
        nn.init.zeros_(block.norm1.linear.weight)
    nn.init.zeros_(dit.proj_out_1.weight)
    nn.init.zeros_(dit.proj_out_2.weight)
    return dit


def predict_noise(dit: nn.Module, noisy: Tensor, timesteps: Tensor) -> Tensor:
    """The noise (B, C, H, W) that a DiT sees in images at timesteps (B,)."""
    # diffusers demands class labels; 0 is the only class of the twin
    return dit(noisy, timestep=timesteps, class_labels=torch.zeros_like(timesteps)).sample


@dataclass
class DiTTwinOutput(ModelOutput):
    """
    What a [`DiTTwin`] returns.

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`): mean squared error of the noise.
        noise (`torch.FloatTensor` of shape `(B, C, H, W)`): the predicted noise.
    """

    loss: Tensor | None = None
    noise: Tensor | None = None


class DiTTwin(nn.Module):
    """
    A Diffusion Transformer that returns its training loss, for the Trainer.

    Args:
        dit (`diffusers.DiTTransformer2DModel`): predicts the noise.
        scheduler (`diffusers.DDPMScheduler`, *optional*): the linear schedule of 1000 steps by default.
        max_timestep (`int`, *optional*, defaults to 100): trained on timesteps 0 to `max_timestep - 1`.

    Raises:
        ValueError: for a `max_timestep` that the schedule does not have.
    """

    main_input_name = "pixel_values"
    # told, or the type checker takes every attribute of a module for a tensor
    dit: "DiTTransformer2DModel"
    scheduler: "DDPMScheduler"

    def __init__(
        self,
        dit: "DiTTransformer2DModel",
        scheduler: "DDPMScheduler | None" = None,
        max_timestep: int = PAPER_TIMESTEPS,
    ) -> None:
        super().__init__()
        self.dit = dit
        self.scheduler = scheduler or noise_scheduler(1.0, SCHEDULE_STEPS)[0]
        steps = self.scheduler.config.num_train_timesteps
        if not 1 <= max_timestep <= steps:
            raise ValueError(f"`max_timestep` must be between 1 and {steps}, got {max_timestep}.")
        self.max_timestep = max_timestep

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        timesteps: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> DiTTwinOutput:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, C, H, W)`): clean images.
            labels (`torch.FloatTensor` of shape `(B, C, H, W)`, *optional*): the noise to add and to predict; drawn
                when left out.
            timesteps (`torch.LongTensor` of shape `(B,)`, *optional*): how much of it; drawn uniformly when left out.
            num_items_in_batch (`int` or `Tensor`, *optional*): pixels of all accumulated batches, to divide the sum
                of errors by; the mean without it.

        Returns:
            [`DiTTwinOutput`].
        """
        noise = torch.randn_like(pixel_values) if labels is None else labels
        if timesteps is None:
            timesteps = torch.randint(0, self.max_timestep, (len(pixel_values),), device=pixel_values.device)
        noisy = self.scheduler.add_noise(pixel_values, noise, timesteps)
        predicted = predict_noise(self.dit, noisy, timesteps)
        if num_items_in_batch is None:
            loss = F.mse_loss(predicted.float(), noise.float())
        else:
            loss = F.mse_loss(predicted.float(), noise.float(), reduction="sum") / num_items_in_batch
        return DiTTwinOutput(loss=loss, noise=predicted)

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the DiT and its schedule as diffusers does, for [`load_dit`]."""
        self.dit.save_pretrained(folder)
        self.scheduler.save_pretrained(folder)


def load_dit(folder: str | Path) -> "tuple[DiTTransformer2DModel, DDPMScheduler]":
    """
    A twin saved by [`DiTTwin.save_pretrained`], in evaluation mode, and its schedule.

    Args:
        folder (`str` or `Path`): where it was saved, or its id on the Hub.
    """
    from diffusers import DDPMScheduler, DiTTransformer2DModel

    dit = DiTTransformer2DModel.from_pretrained(str(folder)).eval()
    return dit, DDPMScheduler.from_pretrained(str(folder))


@torch.no_grad()
def ddim_denoise(
    dit: nn.Module,
    noisy: Tensor,
    scheduler: Any,
    start_timestep: int,
    num_steps: int,
    clip_sample: bool = True,
) -> Tensor:
    """
    Denoise images by DDIM (eta 0): the images are taken for samples at `start_timestep`, and timestep by timestep the
    predicted noise is exchanged for less of it, down to none.

    Args:
        dit (`nn.Module`): a `DiTTransformer2DModel`, or anything called like it.
        noisy (`torch.FloatTensor` of shape `(B, C, H, W)`): noisy images, as the scheduler's `add_noise` makes them
            (-1..1 before the noise).
        scheduler (`diffusers` scheduler): the schedule the model was trained on.
        start_timestep (`int`): how noisy they are taken to be; 99 of 1000 for the paper's level 0.1.
        num_steps (`int`): calls of the model, evenly spaced; `start_timestep + 1` visits every timestep.
        clip_sample (`bool`, *optional*, defaults to `True`): clip every prediction of the clean image to -1..1 (not
            for latents), and exchange the noise that follows from the clipped one, as the official code does.

    Returns:
        `torch.FloatTensor` of shape `(B, C, H, W)`.

    Raises:
        ValueError: for a timestep outside the schedule, or more steps than timesteps.
    """
    from diffusers import DDIMScheduler

    total = len(scheduler.alphas_cumprod)
    if not 0 <= start_timestep < total:
        raise ValueError(f"`start_timestep` must be between 0 and {total - 1}, got {start_timestep}.")
    if not 1 <= num_steps <= start_timestep + 1:
        raise ValueError(
            f"`num_steps` must be between 1 and start_timestep + 1 = {start_timestep + 1}, got {num_steps}."
        )
    # clean images are one step below timestep 0
    visited = torch.linspace(-1, start_timestep, num_steps + 1, dtype=torch.float64)[1:].round().long()
    # DDIMScheduler can only walk its whole schedule in equal strides: give it one that has the visited timesteps alone
    kept = scheduler.alphas_cumprod.double().cpu()[visited]
    betas = 1 - kept / torch.cat([kept.new_ones(1), kept[:-1]])
    walk = DDIMScheduler(
        num_train_timesteps=num_steps, trained_betas=betas.numpy(), clip_sample=clip_sample, set_alpha_to_one=True
    )
    walk.set_timesteps(num_steps)
    images = noisy
    for step in walk.timesteps.tolist():
        timesteps = torch.full((len(images),), int(visited[step]), device=images.device)
        noise = predict_noise(dit, images, timesteps)
        images = walk.step(noise, step, images, eta=0.0, use_clipped_model_output=clip_sample).prev_sample
    return images


__all__ = ["DiTTwin", "DiTTwinOutput", "ddim_denoise", "load_dit", "new_dit", "predict_noise"]
