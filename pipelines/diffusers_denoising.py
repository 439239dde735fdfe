"""`EBTDenoisingPipeline`: denoising by descent with the call and the files of a diffusers pipeline."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import ImageProcessingMixin, PreTrainedModel

from ..configuration import ThinkingConfig
from ..configuration.noise_ebt import noise_scheduler
from ..modeling_ebt.image_processing_ebt import OUTPUT_TYPES, EBTImageProcessor
from ..modeling_ebt.latents import decode, encode, load_vae, need_diffusers, vae_scale_factor
from ..modeling_ebt.modeling_ebt_image import EBTForImageDenoising
from .denoising import check_denoiser, check_noise_options, check_vae, denoise, scale_for_noise
from .image_tiles import Tiling


need_diffusers("`EBTDenoisingPipeline`")

from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline  # noqa: E402
from diffusers.utils import BaseOutput  # noqa: E402
from diffusers.utils.torch_utils import randn_tensor  # noqa: E402


# diffusers looks for a component's class and for the base class that can load it in one and the same module: this one
COMPONENTS = {
    EBTForImageDenoising.__name__: PreTrainedModel,
    EBTImageProcessor.__name__: ImageProcessingMixin,
}


@dataclass
class EBTDenoisingPipelineOutput(BaseOutput):
    """
    Output of [`EBTDenoisingPipeline`]. ``B`` pictures, ``K`` thinking steps.

    Args:
        images (`list` of `PIL.Image.Image`, `np.ndarray` `(B, H, W, C)` or `torch.Tensor` `(B, C, H, W)`):
            The denoised pictures; arrays and tensors from 0 to 1, as a list where the sizes differ.
        energies (`torch.FloatTensor` of shape `(B, K + 1)`, *optional*):
            With `output_energies=True`: before every step and after the last; of a picture in tiles their mean.
        steps_taken (`torch.LongTensor` of shape `(B,)`, *optional*):
            With `output_energies=True`: steps that moved the picture; of tiles the most.
    """

    images: Any
    energies: Tensor | None = None
    steps_taken: Tensor | None = None


class EBTDenoisingPipeline(DiffusionPipeline):
    r"""
    Denoises pictures with an [`EBTForImageDenoising`]. Unlike a diffusion model it has no timesteps: the thinking
    steps take the scheduler's place, and the scheduler only makes noise, for clean pictures.

    The saved folder has one sub-folder for each component; loading it needs the package to be installed. What is said
    of noisy photos in [`ImageDenoisingPipeline`] holds here, too.

    Args:
        model ([`EBTForImageDenoising`]): the model.
        scheduler (`DDPMScheduler`, *optional*): makes the noise of `noise_level`; by default the paper's schedule.
        processor ([`EBTImageProcessor`], *optional*): by default made from the model's config.
        vae (`AutoencoderKL`, *optional*): for a model on latents; by default loaded from `config.vae_name_or_path`.

    Example:

    ```python
    >>> import numpy as np
    >>> import torch
    >>> from ebt_transformers import EBTDenoisingPipeline, EBTForImageDenoising, EBTImageConfig

    >>> model = EBTForImageDenoising(EBTImageConfig.from_preset("4xs", image_size=16, patch_size=4))
    >>> pipe = EBTDenoisingPipeline(model)
    >>> pipe.set_progress_bar_config(disable=True)
    >>> clean = np.zeros((16, 16, 3), dtype=np.uint8)
    >>> pipe(clean, num_inference_steps=2, noise_level=0.1, generator=torch.manual_seed(0)).images[0].size
    (16, 16)
    ```
    """

    _optional_components = ["scheduler", "processor", "vae"]

    def __init__(
        self,
        model: EBTForImageDenoising,
        scheduler: DDPMScheduler | None = None,
        processor: EBTImageProcessor | None = None,
        vae: AutoencoderKL | None = None,
    ) -> None:
        super().__init__()
        check_denoiser(model)
        config = model.config
        if vae is None and config.vae_name_or_path is not None:
            vae = load_vae(config.vae_name_or_path)
        if vae is not None:
            check_vae(vae, config)
            vae.eval()
        if scheduler is None:
            scheduler, _ = noise_scheduler()
        self.unit = vae_scale_factor(vae)
        if processor is None:
            processor = EBTImageProcessor.from_model_config(config, self.unit)
        self.register_modules(model=model.eval(), scheduler=scheduler, processor=processor, vae=vae)

    def register_to_config(self, **values: Any) -> None:
        """Notes where each component's class is found when the pipeline is loaded."""
        for name in ("model", "processor"):
            _, class_name = values.get(name) or (None, None)
            if class_name in COMPONENTS:
                values[name] = (__name__, class_name)
        super().register_to_config(**values)

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        num_inference_steps: int | None = None,
        noise_level: float | None = None,
        noise_std: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        output_energies: bool = False,
        tile_size: int | tuple[int, int] | str | None = "auto",
        tile_overlap: int | None = None,
        batch_size: int | None = None,
        thinking: ThinkingConfig | dict[str, Any] | None = None,
        **thinking_options: Any,
    ) -> EBTDenoisingPipelineOutput | tuple:
        """
        Denoises pictures.

        Args:
            image: a picture (PIL image, file, URL, numpy array or torch tensor), a list or a batch of them, of any
                sizes.
            num_inference_steps (`int`, *optional*): thinking steps, the same as `thinking_steps`; by default what the
                checkpoint says.
            noise_level (`float`, *optional*): first add noise, by the scheduler, this share of the way to pure noise
                (above 0, at most 1); for clean pictures.
            noise_std (`float`, *optional*): standard deviation of the noise the picture has, in units of 0..255;
                scales it to what the model saw in training. See [`ImageDenoisingPipeline`].
            generator (`torch.Generator` or a list of them, one for each picture, *optional*): source of that noise;
                torch's global one by default.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"` or `"pt"`.
            return_dict (`bool`, *optional*, defaults to `True`): an [`EBTDenoisingPipelineOutput`], or a plain tuple.
            output_energies (`bool`, *optional*, defaults to `False`): return energies and steps, too.
            tile_size, tile_overlap: as in [`ImageDenoisingPipeline`].
            batch_size (`int`, *optional*): pictures or tiles that go through the model at once; by default as many as
                there are pictures.
            thinking ([`ThinkingConfig`] or `dict`, *optional*), thinking_options: how to think,
                `thinking_candidates=4` and the like.

        Returns:
            [`EBTDenoisingPipelineOutput`], or a tuple of what it holds: the pictures, and with `output_energies` the
            energies and the steps.

        Raises:
            ValueError: for unknown options and values out of range, and images the processor refuses.
        """
        unknown = sorted(name for name in thinking_options if not name.startswith("thinking_"))
        if unknown:
            raise ValueError(f"Unknown option(s) {', '.join(unknown)}. See `help({type(self).__name__}.__call__)`.")
        if num_inference_steps is not None:
            if thinking_options.get("thinking_steps") is not None:
                raise ValueError("`num_inference_steps` and `thinking_steps` are the same. Give one of them.")
            thinking_options["thinking_steps"] = num_inference_steps
        wanted = ThinkingConfig.from_call(thinking, thinking_options)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}.")
        check_noise_options(noise_std, noise_level, self.vae, "noise_level")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        config = self.model.config
        tiling = Tiling.from_options(
            tile_size, tile_overlap, config.height_and_width, config.patch_size, unit=self.unit
        )
        factor = 1.0 if noise_std is None else scale_for_noise(noise_std)
        timestep = None if noise_level is None else self._timestep(noise_level)

        prepared = self.processor(image, do_pad=True, patch_size=config.patch_size * self.unit)
        images = [torch.from_numpy(pixels) for pixels in prepared["pixel_values"]]
        if isinstance(generator, list) and len(generator) != len(images):
            raise ValueError(f"There are {len(generator)} generators for {len(images)} picture(s). Give one for each.")
        if self.vae is not None:
            images = [encode(self.vae, pixels[None])[0].cpu() for pixels in images]
        if timestep is not None:
            noises = [
                randn_tensor(pixels.shape, generator=generator[number] if isinstance(generator, list) else generator)
                for number, pixels in enumerate(images)
            ]
            at = torch.tensor([timestep])
            images = [
                self.scheduler.add_noise(pixels[None], noise[None], at)[0]
                for pixels, noise in zip(images, noises, strict=True)
            ]
        found = denoise(
            self.model,
            [pixels * factor for pixels in images],
            wanted,
            tiling,
            batch_size or len(images),
            output_energies,
            progress=self.progress_bar,
        )
        pictures: Any = []
        for result, size in zip(found, prepared["original_sizes"], strict=True):
            pixels = result.image[None] if self.vae is None else decode(self.vae, result.image[None]).cpu()
            pictures += self.processor.post_process(pixels, output_type, [size])
        if output_type != "pil" and len({picture.shape for picture in pictures}) == 1:
            pictures = np.stack(pictures) if output_type == "np" else torch.stack(pictures)
        energies = [result.energies for result in found if result.energies is not None]
        output = EBTDenoisingPipelineOutput(
            images=pictures,
            energies=torch.stack(energies) if energies else None,
            steps_taken=torch.tensor([result.steps_taken for result in found]) if output_energies else None,
        )
        return output if return_dict else output.to_tuple()

    def _timestep(self, noise_level: float) -> int:
        """The scheduler's timestep that is this share of the way."""
        steps = self.scheduler.config.num_train_timesteps
        if not 0 < noise_level <= 1 or round(noise_level * steps) < 1:
            raise ValueError(
                f"`noise_level` must be above 0 and at most 1, and at least one of the scheduler's {steps} steps, got "
                f"{noise_level}."
            )
        return round(noise_level * steps) - 1


__all__ = ["EBTDenoisingPipeline", "EBTDenoisingPipelineOutput"]
