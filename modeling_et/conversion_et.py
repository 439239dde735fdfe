"""
The weights of the authors' released image model (github.com/bhoov/energy-transformer-jax), both ways.

They are a numpy archive, `plaindict_ckpt.npz`, without hyper-parameters: the shapes and the authors' setting say what
the model is. Sizes: ``H`` heads, ``Y`` width of a head, ``D`` width, ``K`` memories, ``N`` patches, ``P`` numbers of a
patch.
"""

import math
import os
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# not a sibling, which code that a checkpoint carries must be: no model imports this file
from ..modeling_ebt.image_processing_ebt import EBTImageProcessor
from .completion_et import EnergyTransformerForImageCompletion
from .configuration_energy_transformer import EnergyTransformerConfig


IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]
COLOURS = 3
_BLOCK = "model.blocks.0."


@dataclass(frozen=True)
class Array:
    """
    An official array and what it becomes.

    Args:
        official (`str`): its official name.
        ours (`str`): the name of our parameter.
        axes (`str`): its axes, one letter each; "" for a single number.
        turned (`bool`): whether ours has the axes in reverse order.
    """

    official: str
    ours: str
    axes: str
    turned: bool = False


ARRAYS = (
    Array("Wk", f"{_BLOCK}attention.0.key", "HYD"),
    Array("Wq", f"{_BLOCK}attention.0.query", "HYD"),
    Array("Xi", f"{_BLOCK}memory.patterns", "DK", turned=True),
    Array("Wenc", "patches.weight", "PD", turned=True),
    Array("Benc", "patches.bias", "D"),
    Array("Wdec", "decoder.weight", "DP", turned=True),
    Array("Bdec", "decoder.bias", "P"),
    Array("LNORM_gamma", f"{_BLOCK}norm.gain", ""),
    Array("LNORM_bias", f"{_BLOCK}norm.bias", "D"),
    Array("CLS_token", "cls_token", "D"),
    Array("MASK_token", "mask_token", "D"),
    Array("POS_embed", "positions", "TD"),  # T = 1 + N, the CLS token first
)
# what an archive cannot say, and the authors' forward pass does; a model that differs has no official form
FIXED = (
    *("attention_beta", "hopfield", "self_attention", "num_blocks", "num_relations"),
    *("thinking_steps", "step_size", "layer_norm_eps"),
)


def _problems(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """What is wrong with the names and shapes, in words."""
    names = [row.official for row in ARRAYS]
    missing = [name for name in names if name not in arrays]
    unexpected = sorted(set(arrays) - set(names))
    found = [
        f"{kind}: {', '.join(which)}" for kind, which in (("missing", missing), ("unexpected", unexpected)) if which
    ]
    if missing:
        return found
    sizes: dict[str, int] = {}
    shapes = []
    for row in ARRAYS:
        shape = np.shape(arrays[row.official])
        if not row.axes:
            fits, expected = math.prod(shape) == 1, "one number"
        else:
            fits = len(shape) == len(row.axes)
            for letter, size in zip(row.axes, shape, strict=False):
                fits = fits and sizes.setdefault(letter, size) == size
            expected = (
                f"({', '.join(str(sizes.get(letter, letter)) for letter in row.axes)}{',' * (len(row.axes) == 1)})"
            )
        if not fits:
            shapes.append(f"{row.official} {shape}, expected {expected}")
    return [*found, f"of another shape: {'; '.join(shapes)}"] if shapes else found


def _sizes_of_images(numbers: int, patches: int, patch_size: int | None, image_size: Any) -> dict[str, Any]:
    """Config fields from the numbers of a patch and the count of patches."""
    if patch_size is None:
        patch_size = math.isqrt(numbers // COLOURS)
        if COLOURS * patch_size**2 != numbers:
            raise ValueError(
                f"`Wenc` takes {numbers} numbers of a patch, which is no square of {COLOURS} channels. Give "
                "`patch_size`."
            )
    if patch_size < 1 or numbers % patch_size**2:
        raise ValueError(f"`Wenc` takes {numbers} numbers of a patch, which does not fit `patch_size={patch_size}`.")
    if image_size is None:
        side = math.isqrt(patches)
        if side**2 != patches:
            raise ValueError(f"`POS_embed` has {patches} patches, which make no square image. Give `image_size`.")
        image_size = side * patch_size
    return {"patch_size": patch_size, "num_channels": numbers // patch_size**2, "image_size": image_size}


def energy_transformer_from_official(
    arrays: Mapping[str, np.ndarray], *, patch_size: int | None = None, image_size: int | list[int] | None = None
) -> EnergyTransformerForImageCompletion:
    """
    An image model from the authors' weights, with their setting: self-attention, 12 steps of 0.1, an inverse
    temperature of `1 / sqrt(Y)`. It expects images normalised by ImageNet's mean and deviation.

    Args:
        arrays (`Mapping[str, np.ndarray]`): official arrays by name, as `np.load("plaindict_ckpt.npz")` gives them:
            `Wk`, `Wq` (H, Y, D), `Xi` (D, K), `Wenc` (P, D), `Benc` (D,), `Wdec` (D, P), `Bdec` (P,), `LNORM_gamma`,
            `LNORM_bias`, `CLS_token`, `MASK_token` (D,), `POS_embed` (1 + N, D).
        patch_size (`int`, *optional*): side of a patch in pixels; by default that of square patches with 3 channels.
        image_size (`int` or `list[int]`, *optional*): in pixels; by default that of square images.

    Returns:
        [`EnergyTransformerForImageCompletion`], in evaluation mode.

    Raises:
        ValueError: for arrays that are missing, unexpected, of another shape or not finite, naming them, and for sizes
            that do not fit them.

    Example:

    ```python
    >>> import numpy as np
    >>> from ebt_transformers import (
    ...     EnergyTransformerConfig,
    ...     EnergyTransformerForImageCompletion,
    ...     energy_transformer_from_official,
    ...     energy_transformer_to_official,
    ... )

    >>> config = EnergyTransformerConfig.for_images(hidden_size=8, num_attention_heads=2, image_size=8, patch_size=4)
    >>> arrays = energy_transformer_to_official(EnergyTransformerForImageCompletion(config))
    >>> arrays["Wk"].shape, arrays["POS_embed"].shape
    ((2, 4, 8), (5, 8))
    >>> energy_transformer_from_official(arrays).config.image_size
    8
    ```
    """
    problems = _problems(arrays)
    if problems:
        raise ValueError(f"These are not the weights of an Energy Transformer for images: {'; '.join(problems)}.")
    broken = [row.official for row in ARRAYS if not _is_finite(arrays[row.official])]
    if broken:
        raise ValueError(f"Official weights hold values that are no finite numbers: {', '.join(broken)}.")
    heads, head_dim, width = np.shape(arrays["Wk"])
    numbers, patches = len(arrays["Wenc"]), len(arrays["POS_embed"]) - 1
    config = EnergyTransformerConfig.for_images(
        hidden_size=width,
        num_attention_heads=heads,
        head_dim=head_dim,
        num_memories=np.shape(arrays["Xi"])[1],
        **_sizes_of_images(numbers, patches, patch_size, image_size),
    )
    if config.num_patches != patches:
        raise ValueError(
            f"`POS_embed` has {patches} patches, but images of {config.image_size} with patches of "
            f"{config.patch_size} have {config.num_patches}."
        )
    model = EnergyTransformerForImageCompletion(config)
    model.load_state_dict({row.ours: _to_ours(row, arrays[row.official]) for row in ARRAYS})
    return model.eval()


def _is_finite(array: np.ndarray) -> bool:
    return np.asarray(array).dtype.kind in "fiu" and bool(np.isfinite(array).all())


def _to_ours(row: Array, array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(np.array(array, dtype=np.float32))
    if not row.axes:
        return tensor.reshape(1)
    return tensor.T.contiguous() if row.turned else tensor


def energy_transformer_to_official(model: EnergyTransformerForImageCompletion) -> dict[str, np.ndarray]:
    """
    The inverse of [`energy_transformer_from_official`]: `np.savez("plaindict_ckpt.npz", **arrays)` writes them.

    Args:
        model ([`EnergyTransformerForImageCompletion`]): the model.

    Returns:
        `dict[str, np.ndarray]` of float32 copies by official name; bit for bit what the model was made from,
        `LNORM_gamma` with shape `()`.

    Raises:
        ValueError: for a model that differs from the authors' in something that their archive has no place for.
    """
    config = model.config
    theirs = EnergyTransformerConfig.for_images(
        hidden_size=config.hidden_size, num_attention_heads=config.num_attention_heads, head_dim=config.head_dim
    )
    for name in FIXED:
        ours, fixed = getattr(config, name), getattr(theirs, name)
        if not (math.isclose(ours, fixed) if isinstance(fixed, float) else ours == fixed):
            raise ValueError(f"The official code has nothing for `{name}={ours!r}`; it must be {fixed!r}.")
    state = model.state_dict()
    return {row.official: _to_official(row, state[row.ours]) for row in ARRAYS}


def _to_official(row: Array, tensor: Tensor) -> np.ndarray:
    array = tensor.detach().float().cpu().numpy()
    if not row.axes:
        return np.array(array[0])
    return np.ascontiguousarray(array.T) if row.turned else array.copy()


# ---- files -----------------------------------------------------------------------------------------------------


def is_archive(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a numpy archive (.npz), whatever its name."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return bool(names) and all(name.endswith(".npy") for name in names)


def is_flax(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins like a checkpoint of flax: a MessagePack map whose first key is a string."""
    with Path(path).open("rb") as file:
        start = file.read(6)
    if not start:
        return False
    # a map of 1 to 15 entries, or one whose count takes the next 2 or 4 bytes; pickles begin with 0x80
    key = {0xDE: 3, 0xDF: 5}.get(start[0], 1 if 0x81 <= start[0] <= 0x8F else len(start))
    return key < len(start) and (0xA1 <= start[key] <= 0xBF or start[key] == 0xD9)


def load_official_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """
    Reads the authors' archive. No code in it is run.

    Args:
        path (`str` or `PathLike`): the `.npz` file.

    Returns:
        `dict[str, np.ndarray]`: everything in it, by name.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a checkpoint of flax, which only flax reads, and for anything else that is no such archive.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint file {path}.")
    if is_flax(path):
        raise ValueError(
            f"{path} looks like a checkpoint of flax, which cannot be read without flax. Convert the authors' numpy "
            "archive of the same weights, plaindict_ckpt.npz."
        )
    if not is_archive(path):
        raise ValueError(f"{path} is no numpy archive (.npz).")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as a numpy archive of plain numbers: {error}") from error


def convert_energy_transformer(
    path: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    patch_size: int | None = None,
    image_size: int | list[int] | None = None,
) -> EnergyTransformerForImageCompletion:
    """
    Turns the authors' archive into a folder that `from_pretrained` loads, with an image processor beside the model,
    which normalises as ImageNet is. The folder appears when everything is written, or not at all.

    Args:
        path (`str` or `PathLike`): the official `.npz` file.
        out_dir (`str` or `PathLike`): folder to write; it must be new or empty.
        patch_size, image_size (*optional*): see [`energy_transformer_from_official`].

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError, ValueError: see [`load_official_arrays`] and [`energy_transformer_from_official`].
        FileExistsError: if the folder has something in it already.
    """
    out_dir = Path(out_dir)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise FileExistsError(f"{out_dir} exists already and is not empty. Give a new folder.")
    model = energy_transformer_from_official(load_official_arrays(path), patch_size=patch_size, image_size=image_size)
    scale: dict[str, Any] = {}
    if model.config.num_channels == COLOURS:
        scale = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
    processor = EBTImageProcessor.from_model_config(model.config, **scale)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}-", dir=out_dir.parent) as partial:
        folder = Path(partial) / "model"
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        folder.replace(out_dir)
    return model


__all__ = [
    "convert_energy_transformer",
    "energy_transformer_from_official",
    "energy_transformer_to_official",
    "is_archive",
    "is_flax",
    "load_official_arrays",
]
