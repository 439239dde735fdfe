"""
`EBTImageProcessor`: pictures in, the tensors an image EBT works on out, and back.

Shapes: ``B`` images, ``C`` channels, ``H x W`` pixels.
"""

import os
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_transforms import get_resize_output_image_size, get_size_with_aspect_ratio
from transformers.image_utils import ChannelDimension, SizeDict, is_pil_image, load_image
from transformers.utils import is_vision_available, requires_backends


if is_vision_available():
    import PIL.Image
    import PIL.ImageOps

BICUBIC = 3  # PIL.Image.Resampling.BICUBIC, known without PIL
OUTPUT_TYPES = ("pil", "np", "pt")
IMAGE_COLUMNS = ("image", "img", "images", "pixel_values")  # what data sets call the column with the images
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # what PIL makes grey of a colour with (ITU-R 601-2)
SLACK = 1e-4  # a float image may leave 0..1 by what arithmetic does to it
LARGEST_16_BIT = 65535
VAE_SCALE_FACTOR = 8  # pixels a side for each latent, in nearly every autoencoder

# what a saved or an automatic processor carries beside its options
BOOKKEEPING = ("auto_map", "feature_extractor_type", "image_processor_type", "processor_class")


class EBTImageProcessorKwargs(TypedDict, total=False):
    """The options of [`EBTImageProcessor`], at construction and at every call."""

    do_resize: bool | None
    size: int | list[int] | tuple[int, ...] | dict[str, int] | SizeDict | None
    resample: int | None
    keep_aspect_ratio: bool | None
    do_center_crop: bool | None
    crop_size: int | list[int] | tuple[int, ...] | dict[str, int] | SizeDict | None
    do_rescale: bool | None
    rescale_factor: float | None
    do_normalize: bool | None
    image_mean: float | list[float] | tuple[float, ...] | None
    image_std: float | list[float] | tuple[float, ...] | None
    do_pad: bool | None
    patch_size: int | None
    num_channels: int | None
    input_data_format: str | ChannelDimension | None
    return_tensors: str | None


class EBTImageProcessor(PilBackend):
    r"""
    Prepares pictures for [`EBTForImageDenoising`] and turns its images into pictures again.

    Takes PIL images, files, URLs, numpy arrays and torch tensors; one, a list, or a batch; channels first or last;
    grey, colour, or with an alpha channel (which is dropped). Integers from 0 to 255 and floats from 0 to 1 both
    become -1 to 1. Every option can also be given with a call.

    Args:
        do_resize (`bool`, *optional*, defaults to `False`): Whether to resize.
        size (`int`, `list[int]` or `dict`, *optional*):
            To which size: one number for both sides, `[height, width]`, `{"height": ..., "width": ...}`, or
            `{"shortest_edge": ...}` (also with `"longest_edge"`), which keeps the proportions.
        resample (`int`, *optional*, defaults to 3): A `PIL.Image.Resampling`; 3 is bicubic.
        keep_aspect_ratio (`bool`, *optional*, defaults to `False`):
            Whether resizing to a height and a width keeps the proportions: the picture then becomes just large enough
            to cover that size, for `do_center_crop` to cut the rest off.
        do_center_crop (`bool`, *optional*, defaults to `False`): Whether to cut out the middle, after resizing.
        crop_size (`int`, `list[int]` or `dict`, *optional*): Its height and width.
        do_rescale (`bool`, *optional*, defaults to `True`):
            Whether integers are multiplied by `rescale_factor`. Floats never are: they count as scaled to 0..1.
        rescale_factor (`float`, *optional*, defaults to 1 / 255): What brings integers to 0..1.
        do_normalize (`bool`, *optional*, defaults to `True`):
            Whether to subtract `image_mean` and divide by `image_std`. With `do_rescale` and `do_normalize` off,
            images are taken as they are: as scaled to -1..1 already.
        image_mean, image_std (`float` or `list[float]`, *optional*, default to 0.5):
            0..1 to the model's scale; one number, or one for each channel. [`~EBTImageProcessor.post_process`] goes
            back by them.
        do_pad (`bool`, *optional*, defaults to `False`):
            Whether to fill up sides that are no multiple of `patch_size`, at the bottom and at the right, with the
            picture's mirror image. The sizes before are returned as `original_sizes`, for `post_process` to cut back
            to.
        patch_size (`int`, *optional*, defaults to 16): What both sides have to be a multiple of.
        num_channels (`int`, *optional*, defaults to 3): 3 makes grey pictures coloured ones, 1 the other way round.
        input_data_format (`str`, *optional*):
            `"channels_first"` or `"channels_last"` for arrays whose shape does not tell. PIL images do not need it.
        return_tensors (`str`, *optional*): `"pt"` or `"np"`; a list of arrays by default.

    Raises:
        ValueError: for unknown options and, in a call, for no image at all, the wrong number of channels, values that
            are not finite or out of range, sides that are no multiple of the patch, and images of unequal sizes that
            should make one tensor.
        TypeError: for something that is no image.
        FileNotFoundError: for a string that names no file.

    Example:

    ```python
    >>> import numpy as np
    >>> from ebt_transformers import EBTImageProcessor

    >>> processor = EBTImageProcessor(patch_size=8, do_pad=True)
    >>> picture = np.zeros((20, 30, 3), dtype=np.uint8)
    >>> inputs = processor([picture, picture], return_tensors="pt")
    >>> inputs.pixel_values.shape, inputs.pixel_values.min().item()
    (torch.Size([2, 3, 24, 32]), -1.0)
    >>> processor.post_process(inputs.pixel_values, "np", inputs.original_sizes)[0].shape
    (20, 30, 3)
    ```
    """

    _auto_class = "AutoImageProcessor"  # a saved processor carries its code
    valid_kwargs = EBTImageProcessorKwargs
    model_input_names = ["pixel_values"]

    do_resize = False
    resample = BICUBIC
    keep_aspect_ratio = False
    do_center_crop = False
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = 0.5
    image_std = 0.5
    do_pad = False
    patch_size = 16
    num_channels = 3

    def __init__(self, **kwargs: Any) -> None:
        known = self.valid_kwargs.__annotations__
        unknown = sorted(name for name in kwargs if name not in known and name not in BOOKKEEPING and name[0] != "_")
        if unknown:
            raise ValueError(
                f"Unknown image processor option(s) {', '.join(unknown)}. Allowed: {', '.join(sorted(known))}."
            )
        super().__init__(**kwargs)
        self._check_options(self.patch_size, self.num_channels)

    @classmethod
    def from_model_config(
        cls, config: Any, vae_scale_factor: int = VAE_SCALE_FACTOR, **options: Any
    ) -> "EBTImageProcessor":
        """
        The processor of a model: its patch size and channels; those of the pictures, where the model works on latents.
        Pictures for an Energy Transformer are resized to cover the model's `image_size`, and the middle is cut out:
        its positions belong to one size.

        Args:
            config ([`EBTImageConfig`] or [`EnergyTransformerConfig`]): the model's.
            vae_scale_factor (`int`, *optional*, defaults to 8): pixels a side for each latent; counts for models with
                `vae_name_or_path` only.
            options: of the processor; they win.

        Example:

        ```python
        >>> from ebt_transformers import EBTImageConfig, EBTImageProcessor

        >>> EBTImageProcessor.from_model_config(EBTImageConfig(patch_size=4, num_channels=1)).patch_size
        4
        ```
        """
        of_model: dict[str, Any] = {"patch_size": config.patch_size, "num_channels": config.num_channels}
        if config.model_type == "energy_transformer":
            size = dict(zip(("height", "width"), config.height_and_width, strict=True))
            of_model |= {"do_resize": True, "size": size, "keep_aspect_ratio": True}
            of_model |= {"do_center_crop": True, "crop_size": size}
        elif config.vae_name_or_path is not None:
            of_model = {"patch_size": config.patch_size * vae_scale_factor, "num_channels": 3}
        return cls(**{**of_model, **options})

    def preprocess(self, images: Any, **kwargs: Any) -> BatchFeature:
        """
        Pictures to model input; calling the processor does the same.

        Args:
            images (`PIL.Image.Image`, `str`, `Path`, `np.ndarray`, `torch.Tensor`, or lists of them):
                Arrays are `(H, W)`, `(H, W, C)`, `(C, H, W)`, or batches of the latter two.
            kwargs: options of the class, for this call.

        Returns:
            `BatchFeature` with `pixel_values` `(B, C, H, W)` in float32 (without `return_tensors` a list of B arrays
            `(C, H, W)`), and with `do_pad` also `original_sizes` `(B, 2)`: height and width before the padding.
        """
        unknown = sorted(set(kwargs) - set(self.valid_kwargs.__annotations__))
        if unknown:
            raise ValueError(
                f"Unknown image processor option(s) {', '.join(unknown)}. Allowed: "
                f"{', '.join(sorted(self.valid_kwargs.__annotations__))}."
            )
        return super().preprocess(images, **kwargs)

    def post_process(
        self, images: Tensor | np.ndarray, output_type: str = "pil", original_sizes: Any | None = None
    ) -> list[Any]:
        """
        Images of the model to pictures; what lies outside -1..1 is cut off.

        Args:
            images (`torch.Tensor` or `np.ndarray` of shape `(B, C, H, W)`): on the model's scale, -1..1.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"` images; `"np"`: float32 arrays `(H, W, C)`
                from 0 to 1; `"pt"`: float32 tensors `(C, H, W)` from 0 to 1, on the images' device.
            original_sizes (`(B, 2)` integers, *optional*): height and width to cut each image back to.

        Returns:
            `list`: one picture for every image.

        Raises:
            ValueError: for an unknown `output_type`, images of another shape or not finite, and sizes that do not fit.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}.")
        tensor = images if isinstance(images, Tensor) else torch.as_tensor(images)
        if tensor.dim() != 4:
            raise ValueError(
                f"`images` must have the shape (images, channels, height, width), got {tuple(tensor.shape)}. A single "
                "image needs a first dimension of 1."
            )
        tensor = tensor.detach().float()
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError("The images hold values that are not finite (NaN or infinity).")
        mean, std = (
            torch.as_tensor(value, dtype=torch.float32, device=tensor.device).reshape(-1, 1, 1)
            for value in (self.image_mean, self.image_std)
        )
        pictures = list((tensor * std + mean).clamp(0, 1))
        if original_sizes is not None:
            pictures = [
                picture[:, :height, :width]
                for picture, (height, width) in zip(pictures, self._checked_sizes(original_sizes, tensor), strict=True)
            ]
        if output_type == "pt":
            return pictures
        arrays = [picture.permute(1, 2, 0).cpu().numpy() for picture in pictures]
        return arrays if output_type == "np" else [self._to_pil(array) for array in arrays]

    def process_image(
        self,
        image: Any,
        num_channels: int = 3,
        input_data_format: str | ChannelDimension | None = None,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        **kwargs: Any,
    ) -> np.ndarray:
        """One picture as float32 `(C, H, W)`, in the model's channels, from 0 to 1 (or as it is, without scaling)."""
        if is_pil_image(image):
            array, input_data_format = self._from_pil(image), ChannelDimension.LAST
        elif isinstance(image, Tensor):
            tensor = image.detach().cpu()
            array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        else:
            array = image
        if array.size == 0:
            raise ValueError(f"An image has no pixels: its shape is {array.shape}.")
        scaled = self._to_unit(array, do_rescale, rescale_factor, do_normalize)
        return self._to_channels(self._channels_first(scaled, num_channels, input_data_format), num_channels)

    def resize(self, image: np.ndarray, size: SizeDict, resample: int | None = None, **kwargs: Any) -> np.ndarray:
        """Resizes a float image `(C, H, W)` in full precision; transformers' own goes through 8 bits."""
        requires_backends(self, ["vision"])
        if size.height and size.width:
            height, width = size.height, size.width
        elif size.shortest_edge and size.longest_edge:
            height, width = get_size_with_aspect_ratio(image.shape[-2:], size.shortest_edge, size.longest_edge)
        elif size.shortest_edge:
            height, width = get_resize_output_image_size(
                image, size.shortest_edge, default_to_square=False, input_data_format=ChannelDimension.FIRST
            )
        else:
            raise ValueError(
                f"`size` must hold `height` and `width`, or `shortest_edge` (and `longest_edge`), got {dict(size)}."
            )
        filter_ = PIL.Image.Resampling(BICUBIC if resample is None else resample)
        channels = [np.asarray(PIL.Image.fromarray(channel).resize((width, height), filter_)) for channel in image]
        # a filter with negative weights overshoots at edges
        return np.clip(np.stack(channels), image.min(), image.max())

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Opens files and URLs, upright; what is an image already stays as it is."""
        source = image_url_or_urls
        if isinstance(source, (list, tuple)):
            return [self.fetch_images(item) for item in source]
        if not isinstance(source, (str, os.PathLike)):
            return source
        requires_backends(self, ["vision"])
        source = os.fspath(source)
        if source.startswith(("http://", "https://", "data:image/")):
            return load_image(source)
        if not os.path.isfile(source):
            shown = source if len(source) < 200 else f"{source[:200]}..."
            raise FileNotFoundError(
                f"There is no image file {shown!r}. Give a file, an address (https://...) or a data URL "
                "(data:image/...)."
            )
        with PIL.Image.open(source) as opened:
            # not `load_image`: it makes white of what is brighter than 255 in a 16-bit picture
            return PIL.ImageOps.exif_transpose(opened)

    def _standardize_kwargs(self, **kwargs: Any) -> dict[str, Any]:
        return super()._standardize_kwargs(default_to_square=True, **kwargs)

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> list[Any]:
        """A flat list of single images."""
        flat = self._flatten(self.fetch_images(images))
        if not flat:
            raise ValueError("There is no image: the batch is empty. Give at least one.")
        return flat

    def _flatten(self, images: Any) -> list[Any]:
        if isinstance(images, (list, tuple)):
            return [image for item in images for image in self._flatten(item)]
        if is_pil_image(images):
            return [images]
        if not isinstance(images, (np.ndarray, Tensor)):
            raise TypeError(
                "An image must be a PIL image, a file or URL, a numpy array or a torch tensor, got "
                f"{type(images).__name__}."
            )
        if images.ndim == 4:
            return list(images)
        if images.ndim not in (2, 3):
            raise ValueError(
                "An array must be (height, width), (height, width, channels), (channels, height, width) or a batch of "
                f"the latter two, got the shape {tuple(images.shape)}."
            )
        return [images]

    @staticmethod
    def _from_pil(image: Any) -> np.ndarray:
        """A PIL image as (H, W, C), with as much precision as it has."""
        if image.mode.startswith("I;16"):
            return (np.array(image).astype(np.float32) / LARGEST_16_BIT)[..., None]
        if image.mode in ("1", "LA", "La"):
            image = image.convert("L")
        elif image.mode not in ("L", "I", "F", "RGB"):
            image = image.convert("RGB")
        array = np.array(image)
        return array[..., None] if array.ndim == 2 else array

    @staticmethod
    def _to_unit(array: np.ndarray, do_rescale: bool, rescale_factor: float, do_normalize: bool) -> np.ndarray:
        """As float32: integers from 0 to 1 if they shall be rescaled; checked."""
        whole = not np.issubdtype(array.dtype, np.floating) and array.dtype != np.bool_
        if not (np.issubdtype(array.dtype, np.number) or array.dtype == np.bool_) or np.iscomplexobj(array):
            raise TypeError(f"An image must hold integers or floats, got an array of {array.dtype}.")
        values = array.astype(np.float32)
        if not np.isfinite(values).all():
            raise ValueError("An image holds values that are not finite (NaN or infinity).")
        if do_rescale and whole:
            values = values * np.float32(rescale_factor)
        if do_rescale or do_normalize:
            lowest, highest = float(values.min()), float(values.max())
            if lowest < -SLACK or highest > 1 + SLACK:
                shown = f"got {float(array.min()):g} to {float(array.max()):g}"
                if whole and do_rescale:
                    raise ValueError(
                        f"Images of integers must hold 0 to {round(1 / rescale_factor)}, {shown}. Set "
                        "`rescale_factor` to 1 / (the largest value they can hold)."
                    )
                if whole:
                    raise ValueError(f"Images of integers need `do_rescale=True`, {shown} without it.")
                raise ValueError(
                    f"Images of floats must hold 0 to 1, {shown}. Divide 0..255 by 255, or give them as uint8. For "
                    "images scaled to -1..1 already, set `do_rescale=False` and `do_normalize=False`."
                )
        return values

    @staticmethod
    def _channels_first(
        image: np.ndarray, num_channels: int, input_data_format: str | ChannelDimension | None
    ) -> np.ndarray:
        """(H, W), (H, W, C) or (C, H, W) to (C, H, W)."""
        if image.ndim == 2:
            return image[None]
        if input_data_format is not None:
            return np.moveaxis(image, -1, 0) if input_data_format == ChannelDimension.LAST else image
        allowed = sorted({1, 3, 4, num_channels})
        first, last = image.shape[0] in allowed, image.shape[-1] in allowed
        if first and last and image.shape[0] != image.shape[-1] and num_channels in (image.shape[0], image.shape[-1]):
            first = image.shape[0] == num_channels
        if first:
            return image
        if last:
            return np.moveaxis(image, -1, 0)
        raise ValueError(
            f"An image must have {', '.join(map(str, allowed[:-1]))} or {allowed[-1]} channels, first or last, got "
            f"the shape {image.shape}. A batch of grey images needs a dimension of 1 for the channel."
        )

    @staticmethod
    def _to_channels(image: np.ndarray, num_channels: int) -> np.ndarray:
        """An image (C, H, W) in the model's channels."""
        given = len(image)
        if given == num_channels:
            return image
        if given == 4 and num_channels in (1, 3):
            image = image[:3]
        if len(image) == 3 and num_channels == 1:
            return np.tensordot(LUMA, image, axes=1)[None]
        if len(image) == 1 and num_channels == 3:
            return np.repeat(image, 3, axis=0)
        if len(image) == num_channels:
            return image
        raise ValueError(f"The model takes images of {num_channels} channel(s), got {given}.")

    def _preprocess(
        self,
        images: list[np.ndarray],
        do_resize: bool,
        size: SizeDict | None,
        resample: int | None,
        keep_aspect_ratio: bool,
        do_center_crop: bool,
        crop_size: SizeDict | None,
        do_normalize: bool,
        image_mean: float | Sequence[float],
        image_std: float | Sequence[float],
        do_pad: bool,
        patch_size: int,
        num_channels: int,
        return_tensors: str | None,
        **kwargs: Any,
    ) -> BatchFeature:
        self._check_options(patch_size, num_channels)
        processed, sizes = [], []
        for image in images:
            if do_resize and size is not None:
                image = self.resize(image, self._covering(image, size) if keep_aspect_ratio else size, resample)
            if do_center_crop and crop_size is not None:
                image = self._cut_middle(image, crop_size)
            height, width = image.shape[-2:]
            sizes.append((height, width))
            bottom, right = -height % patch_size, -width % patch_size
            if (bottom or right) and not do_pad:
                raise ValueError(
                    f"Height and width must be multiples of the patch size {patch_size}, got {height} x {width}. Set "
                    "`do_pad=True`, or `do_resize=True` with a `size`, or `do_center_crop=True` with a `crop_size`."
                )
            image = np.pad(image, ((0, 0), (0, bottom), (0, right)), mode="reflect")
            if do_normalize:
                mean, std = (np.asarray(value, np.float32).reshape(-1, 1, 1) for value in (image_mean, image_std))
                image = (image - mean) / std
            processed.append(np.ascontiguousarray(image, dtype=np.float32))
        shapes = sorted({image.shape[-2:] for image in processed})
        if return_tensors is not None and len(shapes) > 1:
            raise ValueError(
                f"Images of unequal sizes ({', '.join(f'{height} x {width}' for height, width in shapes)}) cannot "
                "make one tensor. Give them one by one, or set `do_resize=True` with a `size`, or "
                "`do_center_crop=True` with a `crop_size`; the image-denoising pipeline takes any sizes."
            )
        data: dict[str, Any] = {"pixel_values": processed}
        if do_pad:
            data["original_sizes"] = sizes
        return BatchFeature(data, tensor_type=return_tensors)

    @staticmethod
    def _covering(image: np.ndarray, size: SizeDict) -> SizeDict:
        """The smallest size of an image's proportions that is nowhere smaller than another size."""
        if not size.height or not size.width:
            raise ValueError(f"`keep_aspect_ratio` needs a `size` of `height` and `width`, got {dict(size)}.")
        height, width = image.shape[-2:]
        factor = max(size.height / height, size.width / width)
        return SizeDict(height=max(size.height, round(height * factor)), width=max(size.width, round(width * factor)))

    @staticmethod
    def _cut_middle(image: np.ndarray, size: SizeDict) -> np.ndarray:
        height, width = image.shape[-2:]
        if not size.height or not size.width:
            raise ValueError(f"`crop_size` must hold `height` and `width`, got {dict(size)}.")
        if size.height > height or size.width > width:
            raise ValueError(
                f"`crop_size` ({size.height} x {size.width}) is larger than an image ({height} x {width}). Resize "
                "first (`do_resize=True`), or crop less."
            )
        top, left = (height - size.height) // 2, (width - size.width) // 2
        return image[:, top : top + size.height, left : left + size.width]

    @staticmethod
    def _check_options(patch_size: int, num_channels: int) -> None:
        for name, value in (("patch_size", patch_size), ("num_channels", num_channels)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")

    @staticmethod
    def _checked_sizes(sizes: Any, images: Tensor) -> list[tuple[int, int]]:
        pairs = [tuple(int(side) for side in pair) for pair in sizes]
        height, width = images.shape[-2:]
        good = all(len(pair) == 2 and 0 < pair[0] <= height and 0 < pair[1] <= width for pair in pairs)
        if len(pairs) != len(images) or not good:
            raise ValueError(
                f"`original_sizes` must be the (height, width) of each of the {len(images)} image(s), at most "
                f"{height} x {width}, got {pairs}."
            )
        return [(pair[0], pair[1]) for pair in pairs]

    def _to_pil(self, array: np.ndarray) -> Any:
        requires_backends(self, ["vision"])
        if array.shape[-1] not in (1, 3):
            raise ValueError(
                f"A PIL image has 1 or 3 channels, got {array.shape[-1]}. Use `output_type='np'` or `'pt'`."
            )
        whole = (array * 255).round().astype(np.uint8)
        return PIL.Image.fromarray(whole[..., 0] if whole.shape[-1] == 1 else whole)


__all__ = ["EBTImageProcessor"]
