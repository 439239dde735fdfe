"""
Checkpoints of the official Energy-Based Transformers code, both ways.

What becomes what is said by the tables in `conversion_ebt_text.py` and `conversion_ebt_image.py`; this file has the
functions to call, for all kinds of models, and the files.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging

from . import conversion_ebt_image as image
from . import conversion_ebt_text as text
from .configuration_ebt_image import EBTImageConfig
from .conversion_common_ebt import Weight, refuse, to_official, to_ours, value_of, without_prefixes
from .image_processing_ebt import EBTImageProcessor
from .modeling_ebt import EBTForCausalLM
from .modeling_ebt_image import EBTForImageDenoising


logger = logging.get_logger(__name__)

Config: TypeAlias = text.TextConfig | EBTImageConfig
Model: TypeAlias = text.TextModel | EBTForImageDenoising


def _is_image(hparams: Mapping[str, Any]) -> bool:
    modality = value_of(hparams, "modality")
    if modality not in (text.MODALITY, image.MODALITY):
        refuse("modality", modality, (text.MODALITY, image.MODALITY))
    return modality == image.MODALITY


def _weights_of(config: Config) -> list[Weight]:
    return image.weights_of(config) if isinstance(config, EBTImageConfig) else text.weights_of(config)


def tensors_from_official(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """
    Weights, gradients or anything else keyed and shaped like the official parameters, in our names and layout.

    Args:
        tensors (`Mapping[str, Tensor]`): by official name; names may be missing, others are left out.
        config ([`EBTConfig`], [`EBTImageConfig`] or `LlamaConfig`): of the model.

    Returns:
        `dict[str, Tensor]` of contiguous copies.
    """
    return to_ours(tensors, _weights_of(config))


def tensors_to_official(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """
    The inverse of [`tensors_from_official`].

    Args:
        tensors (`Mapping[str, Tensor]`): by our name; names may be missing, others are left out.
        config ([`EBTConfig`], [`EBTImageConfig`] or `LlamaConfig`): of the model.

    Returns:
        `dict[str, Tensor]` of contiguous copies.
    """
    return to_official(tensors, _weights_of(config))


def config_from_official(hparams: Mapping[str, Any], vocab_size: int | None = None) -> Config:
    """
    The config of the model that official hyper-parameters describe.

    Args:
        hparams (`Mapping[str, Any]`): the flat dictionary of flags a checkpoint holds as `hyper_parameters`. Flags
            without influence on the model are ignored.
        vocab_size (`int`, *optional*): V, which the official code does not record; needed for text.

    Returns:
        [`EBTConfig`]; `LlamaConfig` for `model_name="baseline_transformer"` (Transformer++); [`EBTImageConfig`] for
        `modality="IMG"`.

    Raises:
        ValueError: for an option that is not supported, naming the flag, its value and what is allowed, for a missing
            flag, and for text without `vocab_size`.
    """
    if _is_image(hparams):
        return image.config_from_official(hparams)
    if vocab_size is None:
        raise ValueError("A text model needs `vocab_size`: the number of rows of `embeddings.weight`.")
    return text.config_from_official(hparams, vocab_size)


def config_to_official(config: Config) -> dict[str, Any]:
    """
    The official hyper-parameters of a model. Thinking defaults other than steps and noise are flags of the official
    inference script, not of a checkpoint, and are left out.

    Args:
        config ([`EBTConfig`], [`EBTImageConfig`] or `LlamaConfig`): of the model.

    Raises:
        ValueError: for a field the official code has nothing for, naming it.
    """
    return image.config_to_official(config) if isinstance(config, EBTImageConfig) else text.config_to_official(config)


def model_from_official(
    state_dict: Mapping[str, Tensor], hparams: Mapping[str, Any], *, eos_token_id: int | None = None
) -> Model:
    """
    A model from official weights.

    Args:
        state_dict (`Mapping[str, Tensor]`): official weights by name; the prefixes `model.` and `_orig_mod.` are
            taken off. V is the number of rows of `embeddings.weight` (V, D).
        hparams (`Mapping[str, Any]`): official flags by name; `modality`, `model_name` and `image_task` decide the
            kind of model.
        eos_token_id (`int`, *optional*): end of text. The official code takes it from the tokenizer, and pads with it
            too. Not for images.

    Returns:
        [`EBTForCausalLM`], `LlamaForCausalLM` for the Transformer++ baseline, or [`EBTForImageDenoising`], in
        evaluation mode.

    Raises:
        ValueError: for weights that are missing, unexpected or of another shape, naming them, and for an official
            option that is not supported, naming the flag, its value and what is allowed.
    """
    state_dict = without_prefixes(state_dict)
    if _is_image(hparams):
        if eos_token_id is not None:
            raise ValueError(f"An image model has no tokens: leave out `eos_token_id`, got {eos_token_id}.")
        return image.model_from_official(state_dict, hparams)
    return text.model_from_official(state_dict, hparams, eos_token_id)


def model_to_official(model: Model) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """
    Official weights and flags of a model: the inverse of [`model_from_official`].

    Args:
        model ([`EBTForCausalLM`], `LlamaForCausalLM` or [`EBTForImageDenoising`]): the model.

    Returns:
        The official `state_dict` (copies, without prefix) and the official flags that describe the model.

    Raises:
        TypeError: for another kind of model.
        ValueError: for a model the official code cannot express, naming the config field.
    """
    if isinstance(model, EBTForImageDenoising):
        return image.model_to_official(model)
    if not isinstance(model, (EBTForCausalLM, LlamaForCausalLM)):
        raise TypeError(
            f"Expected an EBTForCausalLM, a LlamaForCausalLM or an EBTForImageDenoising, got {type(model).__name__}."
        )
    return text.model_to_official(model)


# ---- files -----------------------------------------------------------------------------------------------------


def load_official_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """
    Reads a checkpoint that the official trainer (Lightning) wrote, without running any code it may contain.

    Args:
        path (`str` or `PathLike`): the `.ckpt` file.

    Returns:
        Weights by official name without prefixes, and the flat dictionary of official flags.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read, or is no Lightning checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint file {path}.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, OSError, EOFError, ValueError, LookupError, AttributeError) as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"{path} cannot be read as a checkpoint: it is damaged, incomplete, or holds more than tensors and plain "
            f"values ({type(error).__name__}: {reason[0] if reason else 'no further information'})."
        ) from error
    for key in ("state_dict", "hyper_parameters"):
        found = checkpoint.get(key) if isinstance(checkpoint, dict) else None
        if not isinstance(found, Mapping) or not found:
            keys = ", ".join(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__
            raise ValueError(f"{path} is no checkpoint of the official trainer: it has no `{key}`. It holds: {keys}.")
    return without_prefixes(checkpoint["state_dict"]), dict(checkpoint["hyper_parameters"])


def _tokenizer_for(model: text.TextModel, named: str | None, given: str | None) -> Any:
    """The tokenizer of a converted model, which then knows its end of text; None where it cannot be loaded."""
    name = given or named
    try:
        loaded = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the Hub client has many ways to fail
        if given is not None:
            raise OSError(f"The tokenizer {given!r} cannot be loaded: {error}") from error
        logger.warning(
            f"The tokenizer {name!r} that the checkpoint names cannot be loaded here: the model is saved without one, "
            "and without an end-of-text token. Convert again with `tokenizer` set, or save one beside it."
        )
        return None
    if len(loaded) > model.config.vocab_size:
        raise ValueError(
            f"The tokenizer {name!r} has {len(loaded)} tokens, the model {model.config.vocab_size}. It is not the "
            "tokenizer the model was trained with."
        )
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.pad_token_id = loaded.eos_token_id
    return loaded


def convert_checkpoint(
    path: str | os.PathLike[str], out_dir: str | os.PathLike[str], *, tokenizer: str | None = None
) -> Model:
    """
    Turns an official checkpoint into a folder that `from_pretrained` loads, with the tokenizer or the image processor
    beside the model. The folder appears when everything is written, or not at all.

    Args:
        path (`str` or `PathLike`): the official `.ckpt` file.
        out_dir (`str` or `PathLike`): folder to write; it must be new or empty.
        tokenizer (`str`, *optional*): Hub id or folder of the tokenizer to put beside a text model. By default the
            one the checkpoint names, where it can be loaded; else the folder has no tokenizer, and a warning says so.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError, ValueError: see [`load_official_checkpoint`] and [`model_from_official`]; also for a
            tokenizer with more tokens than the model, or given for images.
        FileExistsError: if the folder has something in it already.
        OSError: if writing fails, or the given tokenizer cannot be loaded.
    """
    out_dir = Path(out_dir)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise FileExistsError(f"{out_dir} exists already and is not empty. Give a new folder.")
    state_dict, hparams = load_official_checkpoint(path)
    # the flags are judged first: a refusal should not wait for a download
    model = model_from_official(state_dict, hparams)
    processor: Any
    if not isinstance(model, EBTForImageDenoising):
        processor = _tokenizer_for(model, hparams.get("tokenizer"), tokenizer)
    elif tokenizer is not None:
        raise ValueError(f"An image model has no tokenizer: leave out `tokenizer`, got {tokenizer!r}.")
    else:
        processor = EBTImageProcessor.from_model_config(model.config)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
    try:
        model.save_pretrained(partial)
        if processor is not None:
            processor.save_pretrained(partial)
        partial.chmod(0o755)
        partial.replace(out_dir)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return model


__all__ = [
    "config_from_official",
    "config_to_official",
    "convert_checkpoint",
    "load_official_checkpoint",
    "model_from_official",
    "model_to_official",
    "tensors_from_official",
    "tensors_to_official",
]
