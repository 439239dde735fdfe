"""
The tables of official image denoising checkpoints (`EBT_IMG_Denoise`).

`WEIGHTS` says which tensor becomes which, `FLAGS` and `LIMITS` which hyper-parameter becomes which config field, and
which values there is nothing for here. Sizes: ``T`` patches, ``D`` width, ``C`` channels, ``p`` side of a patch.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .configuration_ebt_image import EBTImageConfig
from .conversion_common_ebt import (
    DESCENT_FLAGS,
    NOISE_STD,
    REQUIRED,
    SHAPE_FLAGS,
    Flag,
    Weight,
    check_comes_back,
    check_limits,
    check_names_and_shapes,
    check_noise_std,
    feed_forward_multiplier,
    feed_forward_width,
    fields_from_flags,
    flags_from_fields,
    keep_flags,
    kept_flags,
    noise_std_to_official,
    refuse_field,
    schedule_from_official,
    schedule_to_official,
    to_official,
    to_ours,
    value_of,
    warn_of_kept_flags,
)
from .modeling_ebt_image import EBTForImageDenoising
from .positions import sincos_positions


MODALITY = "IMG"
POSITIONS = "transformer.pos_embed"  # a frozen table among the weights there, computed here
POSITION_TOLERANCE = 1e-5


# ---- weights ---------------------------------------------------------------------------------------------------

Split = Callable[[Tensor], tuple[Tensor, ...]]

# name: how an official tensor becomes ours, and how ours become it, for a patch of (C, p, p)
TRANSFORMS: dict[str, Callable[[tuple[int, int, int]], tuple[Split, Callable[..., Tensor]]]] = {
    "same": lambda patch: (lambda tensor: (tensor,), lambda tensor: tensor),
    "scalar": lambda patch: (lambda tensor: (tensor.reshape(1),), lambda tensor: tensor.reshape(())),
    "convolution": lambda patch: (lambda tensor: (tensor.flatten(1),), lambda tensor: tensor.unflatten(1, patch)),
    "fused": lambda patch: (lambda tensor: tensor.chunk(3), lambda *parts: torch.cat(parts)),
}

_LAYER = "transformer.blocks.{i}."
_OURS = "model.layers.{i}."
_FUSED = tuple(f"{_OURS}attention.{part}_proj" for part in "qkv")

# official name, our names, transform; {i} stands for every layer, {kind} for `weight` and `bias`
WEIGHTS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("alpha", ("step_size.value",), "scalar"),
    ("learned_adaln_condition.weight", ("model.step_embeddings.weight",), "same"),
    ("transformer.x_embedder.proj.weight", ("model.patches.weight",), "convolution"),
    ("transformer.x_embedder.proj.bias", ("model.patches.bias",), "same"),
    *(
        row
        for kind in ("weight", "bias")
        for row in (
            (f"{_LAYER}attn.qkv.{kind}", tuple(f"{name}.{kind}" for name in _FUSED), "fused"),
            (f"{_LAYER}attn.proj.{kind}", (f"{_OURS}attention.o_proj.{kind}",), "same"),
            (f"{_LAYER}mlp.fc1.{kind}", (f"{_OURS}mlp.fc1.{kind}",), "same"),
            (f"{_LAYER}mlp.fc2.{kind}", (f"{_OURS}mlp.fc2.{kind}",), "same"),
            (f"{_LAYER}adaLN_modulation.1.{kind}", (f"{_OURS}modulation.{kind}",), "same"),
            (f"transformer.final_layer.adaLN_modulation.1.{kind}", (f"model.final_modulation.{kind}",), "same"),
        )
    ),
    ("transformer.final_layer.linear.weight", ("model.energy_head.weight",), "same"),
)


def weights_of(config: EBTImageConfig) -> list[Weight]:
    """The rows of `WEIGHTS` for all layers of this model."""
    patch = (config.num_channels, config.patch_size, config.patch_size)
    return [
        Weight(official.format(i=layer), tuple(name.format(i=layer) for name in ours), *TRANSFORMS[transform](patch))
        for official, ours, transform in WEIGHTS
        for layer in (range(config.num_hidden_layers) if "{i}" in official else (0,))
    ]


def _positions(config: EBTImageConfig) -> Tensor:
    return sincos_positions(*config.grid, config.grid, config.hidden_size)[None].clone()


# ---- hyper-parameters ------------------------------------------------------------------------------------------

# `image_dims`, `ffn_dim_multiplier` and the number of steps need more than a look-up: see `config_from_official`
FLAGS = (*SHAPE_FLAGS, *DESCENT_FLAGS, Flag("patch_size", "patch_size"))

# flag: (the values carried, the official default)
LIMITS: dict[str, tuple[tuple[Any, ...], Any]] = {
    "model_name": (("ebt",), REQUIRED),
    "image_task": (("denoising",), REQUIRED),
    "clamp_futures_grad": ((False,), False),
    "reconstruction_coeff": ((1.0,), 1.0),
    "mcmc_replay_buffer": ((False,), False),
    "langevin_dynamics_noise_learnable": ((False,), False),
}
# of models trained with noise; without noise the flag has no effect
NOISE_LIMITS: dict[str, tuple[tuple[Any, ...], Any]] = {"no_langevin_during_eval": ((True,), False)}

# how much noise the images had in training: not the model's, but good to know, so always kept
DATA_FLAGS = ("diffusion_steps", "denoise_images_noise_level", "randomize_denoise_images_noise_level")

# config fields without an official flag that do not change what the trained model is
LEFT_OUT = (
    "initializer_range",
    "thinking_candidates",
    "thinking_tolerance",
    "thinking_target_energy",
    "thinking_accept_only_lower_energy",
)


def config_from_official(hparams: Mapping[str, Any]) -> EBTImageConfig:
    """See [`~conversion_ebt.config_from_official`]."""
    check_limits(hparams, LIMITS)
    fields = fields_from_flags(hparams, FLAGS)
    fields["intermediate_size"] = feed_forward_width(hparams, fields["hidden_size"])
    if fields["thinking_noise_std"]:
        check_limits(hparams, NOISE_LIMITS)
    height, width = value_of(hparams, "image_dims")
    if height != width:
        raise ValueError(f"The official code has square images only, got `image_dims={hparams['image_dims']!r}`.")
    # the landscapes of the flags are one and the same: the official image transformer does not see the step
    config = EBTImageConfig(image_size=height, **fields, **schedule_from_official(hparams, conditioned=False))
    keep_flags(config, hparams, False, dict.fromkeys(DATA_FLAGS, REQUIRED))
    return config


def config_to_official(config: EBTImageConfig) -> dict[str, Any]:
    """See [`~conversion_ebt.config_to_official`]."""
    height, width = config.height_and_width
    if height != width:
        refuse_field("image_size", config.image_size, "square")
    inner = config.intermediate_size or config.hidden_size
    hparams = {
        "modality": MODALITY,
        **{flag: values[0] for flag, (values, _) in LIMITS.items()},
        "image_dims": [height, width],
        "ffn_dim_multiplier": feed_forward_multiplier(config.hidden_size, inner) or 1.0,  # None crashes there
        **flags_from_fields(config, FLAGS),
        "no_langevin_during_eval": config.thinking_noise_std > 0,
        **schedule_to_official(config, conditioned=False),
        **kept_flags(config),
    }
    check_comes_back(config, config_from_official(hparams), LEFT_OUT)
    return hparams


# ---- models ----------------------------------------------------------------------------------------------------


def model_from_official(state_dict: Mapping[str, Tensor], hparams: Mapping[str, Any]) -> EBTForImageDenoising:
    """See [`~conversion_ebt.model_from_official`]; the weights are without prefixes."""
    config = config_from_official(hparams)
    model = EBTForImageDenoising(config)
    table, positions = weights_of(config), _positions(config)
    check_names_and_shapes(state_dict, model.state_dict(), table, {NOISE_STD: (), POSITIONS: tuple(positions.shape)})
    check_noise_std(state_dict, config)
    given = state_dict.get(POSITIONS, positions).float()
    if (given.cpu() - positions).abs().max() > POSITION_TOLERANCE:
        raise ValueError(
            f"`{POSITIONS}` is not the fixed sine-cosine table that the official code makes; positions cannot be "
            "learned here."
        )
    model.load_state_dict(to_ours(state_dict, table))
    warn_of_kept_flags(config, harmless=DATA_FLAGS)
    return model.eval()


def model_to_official(model: EBTForImageDenoising) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """See [`~conversion_ebt.model_to_official`]."""
    hparams = config_to_official(model.config)
    state_dict = to_official(model.state_dict(), weights_of(model.config))
    return {**state_dict, POSITIONS: _positions(model.config), **noise_std_to_official(model.config)}, hparams


__all__ = [
    "LIMITS",
    "MODALITY",
    "NOISE_LIMITS",
    "config_from_official",
    "config_to_official",
    "model_from_official",
    "model_to_official",
    "weights_of",
]
