"""
`pipeline("image-completion")`: pictures with masked patches in, completed pictures out, with the thinking behind them
on request.

Shapes: ``C`` channels, ``H x W`` pixels, ``N`` patches in ``R`` rows and ``Q`` columns, ``S`` blocks, ``T`` steps of
each.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..configuration.thinking_ebt import FLAT_THINKING_NAMES, ThinkingConfig
from ..modeling_ebt.image_processing_ebt import OUTPUT_TYPES
from .patch_masks import given_patches, random_patches
from .picture_pipeline import PicturePipeline, picture_of


TASK = "image-completion"
MASK_COLUMN = "mask"
MASK_OPTIONS = ("mask", "mask_ratio", "mask_seed")
FORWARD_OPTIONS = ("paste_visible", "output_energies", "output_trajectory")
GREY = 0.5  # what masked patches are shown as


class ImageCompletionPipeline(PicturePipeline):
    r"""
    Completes pictures with [`EnergyTransformerForImageCompletion`]: `pipeline("image-completion", model=...)` after
    `import ebt_transformers`.

    The model sees some patches of a picture and finds the others by descending its energy. It works on pictures of one
    size: others are resized to cover it, and the middle is cut out; so results have the model's `image_size`.

    Args:
        model ([`EnergyTransformerForImageCompletion`] or `str`): the model, or a folder or Hub id of one.
        image_processor ([`EBTImageProcessor`], *optional*): by default the one saved with the model, or one made from
            its config, which scales to -1..1. The authors' models take ImageNet's mean and standard deviation:
            `EBTImageProcessor.from_model_config(config, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224,
            0.225])`.
        batch_size (`int`, *optional*, defaults to 1): pictures that go through the model at once.
        kwargs: defaults of the options of a call, below.

    Options, at construction and of every call, which wins:

        mask (PIL image, file, URL, array or tensor, *optional*): what is to be found: a mask of the picture's own size
            in pixels, bright where it is masked, of which every patch it touches is masked; or a boolean array of
            patches, `(R, Q)` or `(N,)`. With a list of pictures also a list, one (or `None`) for each. A data set may
            have a column `mask`. By default patches are drawn at random.
        mask_ratio (`float`, *optional*): share of the patches that are drawn, above 0 and at most 1. By default the
            model's `config.mask_ratio`.
        mask_seed (`int`, *optional*, defaults to 0): seed of the drawing; each picture's own, whatever its batch.
        thinking ([`ThinkingConfig`] or `dict`, *optional*), thinking_steps, thinking_step_size, thinking_tolerance,
            ...: how to think. Options without a meaning for an Energy Transformer raise.
        paste_visible (`bool`, *optional*, defaults to `True`): take visible patches from the picture itself. `False`
            shows all that the model decodes.
        output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"` (float32 `(H, W, C)` from 0 to 1) or
            `"pt"` (float32 `(C, H, W)` from 0 to 1).
        output_energies (`bool`, *optional*, defaults to `False`): add `energies` and `steps_taken`.
        output_trajectory (`bool`, *optional*, defaults to `False`): add `trajectory`.

    Example:

    ```python
    >>> import numpy as np
    >>> from transformers import pipeline
    >>> from ebt_transformers import EnergyTransformerConfig, EnergyTransformerForImageCompletion

    >>> config = EnergyTransformerConfig.for_images(
    ...     hidden_size=16, num_attention_heads=2, image_size=16, patch_size=4
    ... )
    >>> model = EnergyTransformerForImageCompletion(config)
    >>> completer = pipeline("image-completion", model=model, device="cpu", thinking_steps=3)
    >>> result = completer(np.zeros((20, 30, 3), dtype=np.uint8), output_energies=True)
    >>> result["image"].size, int(result["mask"].sum()), len(result["energies"])
    ((16, 16), 8, 4)
    ```
    """

    TASK = TASK
    AUTO_MODEL = "AutoModelForMaskedImageModeling"
    DOING = "Completing"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "mask" in kwargs:
            raise ValueError("`mask` is an option of a call. At construction `mask_ratio` and `mask_seed` can be set.")
        super().__init__(*args, **kwargs)

    def _check_model(self) -> None:
        # by what it has, not by its class: code from the Hub brings classes of its own
        if not hasattr(self.model, "draw_masks"):
            raise TypeError(
                f"{type(self.model).__name__} does not complete images. Give an EnergyTransformerForImageCompletion."
            )

    def __call__(
        self,
        images: Any,
        *,
        mask: Any = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        progress: bool | None = None,
        **options: Any,
    ) -> Any:
        """
        Completes pictures.

        Args:
            images: a picture (PIL image, file, URL, numpy array or torch tensor), a list or a batch array of them, a
                dataset (of pictures, or of rows with a column `image` and maybe a column `mask`) or a generator.
                Arrays hold integers from 0 to 255 or floats from 0 to 1.
            mask (*optional*): see the class; one for all pictures, or a list with one for each.
            batch_size (`int`, *optional*): pictures that go through the model at once.
            num_workers (`int`, *optional*): processes that read the pictures.
            progress (`bool`, *optional*): show a progress bar; by default for lists of more than 10 pictures, never
                for a single one.
            options: those of the class.

        Returns:
            A `dict` for a single picture, a `list` of them for a list or a batch, an iterator of them for a dataset or
            a generator, in order; with

            - `image`: the completed picture, as `output_type` says;
            - `masked_image`, `original`: what the model saw, masked patches in grey, and the whole picture;
            - `mask` (boolean array `(R, Q)`, a tensor with `output_type="pt"`): the patches that were masked;
            - `energies` (`list[float]`, with `output_energies`): the energy before every step and after the last, of
              several blocks a list for each; and `steps_taken` (`int`, or a list): the steps that moved it;
            - `trajectory` (`list`, with `output_trajectory`): the completed picture at the start and after every step
              of every block.

        Raises:
            ValueError: for unknown options and values out of range, no picture at all, images the image processor
                refuses, and masks of the wrong size, number, or without a masked patch.
            FileNotFoundError: for a file that does not exist.
        """
        if mask is not None:
            if options.get("mask_ratio") is not None or options.get("mask_seed") is not None:
                raise ValueError("`mask` says which patches are masked: `mask_ratio` and `mask_seed` have no effect.")
            images, mask = _paired(images, mask)
            options |= {} if mask is None else {"mask": mask}
        return self._run_pictures(images, batch_size, num_workers, progress, options)

    def _sanitize_parameters(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        forward: dict[str, Any] = {"thinking": self._take_thinking(options)}
        forward |= {name: options.pop(name) for name in FORWARD_OPTIONS if name in options}
        preprocess = {name: options.pop(name) for name in MASK_OPTIONS if name in options}
        postprocess = {name: options.pop(name) for name in ("output_type",) if name in options}
        if options:
            allowed = sorted([*MASK_OPTIONS, *FORWARD_OPTIONS, "output_type", "thinking", *FLAT_THINKING_NAMES])
            raise ValueError(f"Unknown option(s) {', '.join(sorted(options))}. Allowed: {', '.join(allowed)}.")
        output_type = postprocess.get("output_type", "pil")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}.")
        for name in FORWARD_OPTIONS:
            if not isinstance(forward.get(name, False), bool):
                raise ValueError(f"`{name}` must be True or False, got {forward[name]!r}.")
        _check_drawing(preprocess.get("mask_ratio"), preprocess.get("mask_seed"))
        return preprocess, forward, postprocess

    def preprocess(
        self, image: Any, mask: Any = None, mask_ratio: float | None = None, mask_seed: int | None = None
    ) -> dict[str, Any]:
        """A picture as the model's input, with the patches to mask."""
        config = self.model.config
        own = image.get(MASK_COLUMN) if isinstance(image, Mapping) else None
        mask = mask if own is None else own
        picture = self.image_processor.fetch_images(picture_of(image))
        pixels = self.image_processor(picture, return_tensors="pt")["pixel_values"]
        if len(pixels) != 1:
            raise ValueError(f"One entry of a list must be one picture, got {len(pixels)}. Give a flat list.")
        if tuple(pixels.shape[-2:]) != config.height_and_width:
            raise ValueError(
                f"The image processor makes {pixels.shape[-2]} x {pixels.shape[-1]} pixels of the picture, and the "
                f"model takes {config.height_and_width[0]} x {config.height_and_width[1]}. Use "
                "`EBTImageProcessor.from_model_config(model.config)`."
            )
        if mask is None:
            share = config.mask_ratio if mask_ratio is None else mask_ratio
            masked = random_patches(config.num_patches, share, 0 if mask_seed is None else mask_seed)
        else:
            masked = given_patches(mask, picture, self.image_processor, config.grid)
        return {"prepared": {"pixel_values": pixels[0], "masked": masked}}

    def _forward(
        self,
        model_inputs: dict[str, Any],
        thinking: ThinkingConfig | None = None,
        paste_visible: bool = True,
        output_energies: bool = False,
        output_trajectory: bool = False,
    ) -> dict[str, Any]:
        entries = model_inputs["prepared"]
        batched = isinstance(entries, list)
        entries = entries if batched else [entries]
        pixels = torch.stack([entry["pixel_values"] for entry in entries])
        masked = torch.stack([entry["masked"] for entry in entries])
        found = self.model(
            pixels,
            bool_masked_pos=masked,
            thinking=thinking,
            output_energies=output_energies,
            output_trajectory=output_trajectory,
        )
        hidden = self._in_pixels(masked)
        kept = ~hidden & paste_visible
        results = []
        for row, image in enumerate(pixels):
            result: dict[str, Any] = {
                "original": image[None],
                "masked_image": torch.where(hidden[row], self._grey(image), image)[None],
                "image": torch.where(kept[row], image, found.reconstruction[row])[None],
                "mask": masked[row].view(self.model.config.grid),
            }
            if output_energies:
                result |= {"energies": found.energies[row], "steps_taken": found.steps_taken[row]}
            if output_trajectory:
                result["trajectory"] = torch.where(kept[row], image, found.trajectory[row])
            results.append(result)
        return {"results": results if batched else results[0]}

    def postprocess(self, model_outputs: dict[str, Any], output_type: str = "pil") -> dict[str, Any]:
        """Pictures, floats and integers of one image's tensors."""
        found = model_outputs["results"]

        def pictures(images: Tensor) -> list[Any]:
            return self.image_processor.post_process(images, output_type)

        record: dict[str, Any] = {name: pictures(found[name])[0] for name in ("image", "masked_image", "original")}
        record["mask"] = found["mask"] if output_type == "pt" else found["mask"].numpy()
        if "energies" in found:
            for name in ("energies", "steps_taken"):
                values = found[name].tolist()
                record[name] = values[0] if len(values) == 1 else values
        if "trajectory" in found:
            record["trajectory"] = pictures(found["trajectory"])
        return record

    def _in_pixels(self, masked: Tensor) -> Tensor:
        """Patches `(B, N)` as pixels `(B, 1, H, W)`."""
        config = self.model.config
        grid = masked.view(-1, 1, *config.grid)
        return grid.repeat_interleave(config.patch_size, -2).repeat_interleave(config.patch_size, -1)

    def _grey(self, image: Tensor) -> Tensor:
        """Grey on the model's scale, for every channel `(C or 1, 1, 1)`."""
        mean, std = (
            torch.as_tensor(value, dtype=image.dtype, device=image.device).reshape(-1, 1, 1)
            for value in (self.image_processor.image_mean, self.image_processor.image_std)
        )
        return (GREY - mean) / std


def _paired(images: Any, mask: Any) -> tuple[Any, Any]:
    """Pictures and a mask for each as rows; or, of one mask for all, both as they are."""
    several = isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4
    stacked = several and getattr(mask, "ndim", 0) == 3 and len(mask) == len(images) and len(images) > 1
    if not stacked and not isinstance(mask, (list, tuple)):
        return images, mask
    if not several or len(mask) != len(images):
        given = f"{len(images)} pictures" if several else "no list of pictures"
        raise ValueError(
            f"Several masks need as many pictures in a list, got {len(mask)} masks and {given}. One mask is an array, "
            "not a list."
        )
    rows = [
        {"image": picture_of(image), **({} if one is None else {MASK_COLUMN: one})}
        for image, one in zip(images, mask, strict=True)
    ]
    return rows, None


def _check_drawing(ratio: Any, seed: Any) -> None:
    if ratio is not None and not (_is_number(ratio) and 0 < ratio <= 1):
        raise ValueError(f"`mask_ratio` must be above 0 and at most 1, got {ratio!r}.")
    if seed is not None and (not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or seed < 0):
        raise ValueError(f"`mask_seed` must be an integer of at least 0, got {seed!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


__all__ = ["TASK", "ImageCompletionPipeline"]
