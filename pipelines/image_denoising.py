"""
`pipeline("image-denoising")`: noisy pictures in, denoised pictures out, with the thinking behind them on request.

Shapes: ``C`` channels, ``H x W`` pixels (or latents), ``K`` thinking steps.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils.logging import tqdm

from ..configuration.noise_ebt import noise_scheduler
from ..configuration.thinking_ebt import FLAT_THINKING_NAMES, ThinkingConfig
from ..modeling_ebt.image_processing_ebt import OUTPUT_TYPES
from ..modeling_ebt.latents import Autoencoder, decode, encode, load_vae, need_diffusers, vae_scale_factor
from .denoising import check_denoiser, check_noise_options, check_vae, denoise, scale_for_noise
from .image_tiles import Tiling
from .picture_pipeline import PicturePipeline, is_one_picture, picture_of


TASK = "image-denoising"
FORWARD_OPTIONS = (
    "add_noise_level",
    "noise_seed",
    "noise_std",
    "output_energies",
    "output_trajectory",
    "tile_size",
    "tile_overlap",
    "_batch_size",
    "_progress",
)


class ImageDenoisingPipeline(PicturePipeline):
    r"""
    Denoises pictures with [`EBTForImageDenoising`]: `pipeline("image-denoising", model=...)` after
    `import ebt_transformers`. (transformers 5 has no image-to-image pipeline any more; this one stands alone.)

    Pictures may have any size, also in one call. Sides that are no multiple of the patch are filled up with the
    picture's mirror image and cut back. Pictures larger than the model's `image_size` are denoised in overlapping
    tiles.

    Whose noise? The model was trained on `sqrt(a) x + sqrt(1 - a) n`: clean pictures `x` on -1..1, *made fainter* and
    given Gaussian noise of one strength. A noisy photo is `x + s n`, not fainter, with what left 0..255 cut off. With
    `noise_std` its contrast is brought to what the model knows (see the option); how well it does then depends on how
    near the photo's noise is to the noise it was trained with. By default a picture is taken as it is.

    Args:
        model ([`EBTForImageDenoising`] or `str`): the model, or a folder or Hub id of one.
        image_processor ([`EBTImageProcessor`], *optional*): by default the one saved with the model, or one made from
            its config.
        vae (`diffusers.AutoencoderKL`, *optional*): for a model on latents, instead of loading
            `config.vae_name_or_path` when it is first needed.
        batch_size (`int`, *optional*, defaults to 1): pictures or tiles that go through the model at once.
        kwargs: defaults of the options of a call, below.

    Options, at construction and of every call, which wins:

        thinking ([`ThinkingConfig`] or `dict`, *optional*), thinking_steps, thinking_candidates, ...: how to think.
        output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"` (float32 `(H, W, C)` from 0 to 1) or
            `"pt"` (float32 `(C, H, W)` from 0 to 1).
        output_energies (`bool`, *optional*, defaults to `False`): add `energies` and `steps_taken`.
        output_trajectory (`bool`, *optional*, defaults to `False`): add `trajectory`.
        tile_size (`int`, `(int, int)`, `"auto"` or `None`, *optional*, defaults to `"auto"`): height and width of the
            tiles of larger pictures, multiples of the patch size; `"auto"` is the model's `image_size`, `None`
            denoises every picture whole, with positions interpolated.
        tile_overlap (`int`, *optional*): rows and columns that neighbouring tiles share; by default a quarter of a
            tile.
        noise_std (`float`, *optional*): standard deviation of the noise the picture has, in units of 0..255. The
            picture is multiplied by `1 / sqrt(1 + (noise_std / 127.5) ** 2)`, which makes `x + s n` what the model
            calls a noisy image. Not for models on latents.
        add_noise_level (`float`, *optional*): for demonstrations with clean pictures: first add noise as in training,
            this share of the way to pure noise (above 0, at most 1; the paper's are 0.1 and 0.2). Adds `noisy_image`.
        noise_seed (`int`, *optional*, defaults to 0): seed of that noise; each picture's own, whatever its batch.

    Example:

    ```python
    >>> import numpy as np
    >>> from transformers import pipeline
    >>> from ebt_transformers import EBTForImageDenoising, EBTImageConfig

    >>> model = EBTForImageDenoising(EBTImageConfig.from_preset("4xs", image_size=16, patch_size=4))
    >>> denoiser = pipeline("image-denoising", model=model, device="cpu", thinking_steps=2)
    >>> result = denoiser(np.zeros((18, 30, 3), dtype=np.uint8), output_energies=True)
    >>> result["image"].size, len(result["energies"])
    ((30, 18), 3)
    ```
    """

    TASK = TASK
    AUTO_MODEL = "AutoModelForImageToImage"
    DOING = "Denoising"

    def __init__(self, *args: Any, vae: Autoencoder | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if vae is not None:
            check_vae(vae, self.model.config)
            vae = vae.to(self.device).eval()
        self._vae = vae

    def _check_model(self) -> None:
        check_denoiser(self.model)

    @property
    def vae(self) -> Autoencoder | None:
        """The autoencoder of a model on latents, loaded when it is first asked for; `None` for a model on pixels."""
        name = self.model.config.vae_name_or_path
        if self._vae is None and name is not None:
            vae = load_vae(name)
            check_vae(vae, self.model.config)
            self._vae = vae.to(self.device)
        return self._vae

    def __call__(
        self,
        images: Any,
        *,
        batch_size: int | None = None,
        num_workers: int | None = None,
        progress: bool | None = None,
        **options: Any,
    ) -> Any:
        """
        Denoises pictures.

        Args:
            images: a picture (PIL image, file, URL, numpy array or torch tensor), a list or a batch array of them, a
                dataset (of pictures, or of rows with a column `image`) or a generator. Arrays hold integers from 0 to
                255 or floats from 0 to 1.
            batch_size (`int`, *optional*): pictures or tiles that go through the model at once.
            num_workers (`int`, *optional*): processes that read the pictures.
            progress (`bool`, *optional*): show a progress bar; by default for lists of more than 10 pictures. For a
                single picture it counts the tiles.
            options: those of the class.

        Returns:
            A `dict` for a single picture, a `list` of them for a list or a batch, an iterator of them for a dataset or
            a generator, in order; with

            - `image`: the denoised picture, as `output_type` says;
            - `energies` (`list[float]`, with `output_energies`): the energy before every step and after the last; of a
              picture in tiles their mean; and `steps_taken` (`int`): the steps that moved it; of tiles the most;
            - `trajectory` (`list`, with `output_trajectory`): the start and the picture after every step;
            - `noisy_image` (with `add_noise_level`): the picture with the noise added.

        Raises:
            ValueError: for unknown options and values out of range, no picture at all, and images the image processor
                refuses.
            FileNotFoundError: for a file that does not exist.
            ImportError: if the model or an option needs diffusers and it is missing.
        """
        options["_batch_size"] = self._pictures_at_once if batch_size is None else batch_size
        # of a single picture the tiles are counted
        options["_progress"] = bool(progress) and is_one_picture(images) and getattr(images, "ndim", 0) != 4
        return self._run_pictures(images, batch_size, num_workers, progress, options)

    def _sanitize_parameters(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        forward: dict[str, Any] = {"thinking": self._take_thinking(options)}
        forward |= {name: options.pop(name) for name in FORWARD_OPTIONS if name in options}
        postprocess = {}
        if "output_type" in options:
            postprocess["output_type"] = options.pop("output_type")
            if postprocess["output_type"] not in OUTPUT_TYPES:
                raise ValueError(
                    f"`output_type` must be one of {', '.join(OUTPUT_TYPES)}, got {postprocess['output_type']!r}."
                )
        if options:
            public = [name for name in FORWARD_OPTIONS if name[0] != "_"]
            allowed = sorted([*public, "output_type", "thinking", *FLAT_THINKING_NAMES])
            raise ValueError(f"Unknown option(s) {', '.join(sorted(options))}. Allowed: {', '.join(allowed)}.")
        return {}, forward, postprocess

    @property
    def _unit(self) -> int:
        """Pixels a side for each cell the model works on."""
        return vae_scale_factor(self.vae)

    def preprocess(self, image: Any) -> dict[str, Any]:
        """A picture as the model's input, with its size before the padding."""
        # a model knows its own patches, whatever a processor saved elsewhere says
        multiple = self.model.config.patch_size * self._unit
        prepared = self.image_processor(picture_of(image), do_pad=True, patch_size=multiple, return_tensors="pt")
        if len(prepared["pixel_values"]) != 1:
            raise ValueError(
                f"One entry of a list must be one picture, got {len(prepared['pixel_values'])}. Give a flat list."
            )
        height, width = prepared["original_sizes"][0].tolist()
        return {"prepared": {"pixel_values": prepared["pixel_values"][0], "size": (height, width)}}

    def _forward(
        self,
        model_inputs: dict[str, Any],
        thinking: ThinkingConfig | None = None,
        output_energies: bool = False,
        output_trajectory: bool = False,
        tile_size: int | Sequence[int] | str | None = "auto",
        tile_overlap: int | None = None,
        add_noise_level: float | None = None,
        noise_seed: int = 0,
        noise_std: float | None = None,
        _batch_size: int = 1,
        _progress: bool = False,
    ) -> dict[str, Any]:
        config, vae = self.model.config, self.vae
        check_noise_options(noise_std, add_noise_level, vae, "add_noise_level")
        tiling = Tiling.from_options(
            tile_size, tile_overlap, config.height_and_width, config.patch_size, unit=self._unit
        )
        entries = model_inputs["prepared"]
        batched = isinstance(entries, list)
        entries = entries if batched else [entries]
        images = [entry["pixel_values"] for entry in entries]
        if vae is not None:
            images = [encode(vae, image[None])[0] for image in images]
        if noise_std is not None:
            images = [image * scale_for_noise(noise_std) for image in images]
        noisy: list[Tensor] = []
        if add_noise_level is not None:
            need_diffusers("`add_noise_level`")
            images = noisy = [self._with_noise(image, add_noise_level, noise_seed) for image in images]
        found = denoise(
            self.model,
            images,
            thinking,
            tiling,
            _batch_size,
            bool(output_energies),
            bool(output_trajectory),
            (lambda batches: tqdm(batches, desc="Denoising", unit="batch")) if _progress else None,
        )
        results = []
        for number, (entry, denoised) in enumerate(zip(entries, found, strict=True)):
            result: dict[str, Any] = {"size": entry["size"], "image": self._to_pixels(denoised.image[None])}
            if denoised.energies is not None:
                result |= {"energies": denoised.energies, "steps_taken": denoised.steps_taken}
            if denoised.trajectory is not None:
                result["trajectory"] = self._to_pixels(denoised.trajectory)
            if noisy:
                result["noisy_image"] = self._to_pixels(noisy[number][None])
            results.append(result)
        return {"results": results if batched else results[0]}

    def postprocess(self, model_outputs: dict[str, Any], output_type: str = "pil") -> dict[str, Any]:
        """Pictures, floats and integers of one image's tensors."""
        found = model_outputs["results"]

        def pictures(images: Tensor) -> list[Any]:
            return self.image_processor.post_process(images, output_type, [found["size"]] * len(images))

        record: dict[str, Any] = {"image": pictures(found["image"])[0]}
        if "energies" in found:
            record |= {"energies": found["energies"].tolist(), "steps_taken": found["steps_taken"]}
        if "trajectory" in found:
            record["trajectory"] = pictures(found["trajectory"])
        if "noisy_image" in found:
            record["noisy_image"] = pictures(found["noisy_image"])[0]
        return record

    def _to_pixels(self, images: Tensor) -> Tensor:
        """What the model works on `(N, C, H, W)` as images."""
        return images if self.vae is None else torch.cat([decode(self.vae, image[None]) for image in images])

    @staticmethod
    def _with_noise(image: Tensor, level: float, seed: int) -> Tensor:
        """An image `(C, H, W)` with noise as in training, the same on every device."""
        scheduler, timestep = noise_scheduler(level)
        noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed)).to(image.device)
        return scheduler.add_noise(image[None], noise[None], torch.tensor([timestep], device=image.device))[0]


__all__ = ["TASK", "ImageDenoisingPipeline"]
