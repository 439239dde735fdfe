"""Twins: the ordinary models of the same shape that EBTs are compared with."""

from typing import TYPE_CHECKING, Any

from .configuration_ebt import EBTConfig
from .configuration_ebt_image import EBTImageConfig
from .presets_ebt import preset_fields


if TYPE_CHECKING:
    from transformers import LlamaConfig


def transformer_pp_config(preset: str | EBTConfig, **overrides: Any) -> "LlamaConfig":
    """
    The Transformer++ twin of a preset or of an [`EBTConfig`]: a Llama-style model of the same width, depth, heads,
    feed-forward width and vocabulary (paper p. 34).

    Args:
        preset (`str` or [`EBTConfig`]): size by name, or the config to take the shape from.
        overrides: any other field of `LlamaConfig`, which wins.

    Raises:
        ValueError: for an unknown preset.

    Example:

    ```python
    >>> from ebt_transformers import transformer_pp_config

    >>> transformer_pp_config("4xs", vocab_size=256).intermediate_size
    128
    ```
    """
    # not at the top: transformers imports this module while the Auto classes, which Llama's needs, are half imported
    from transformers import LlamaConfig

    values: dict[str, Any]
    if isinstance(preset, str):
        defaults = EBTConfig()
        values = {**preset_fields(preset), "vocab_size": defaults.vocab_size}
        values["max_position_embeddings"] = defaults.max_position_embeddings
        values["rms_norm_eps"] = defaults.rms_norm_eps
    else:
        shared = (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim", "hidden_act"),
            *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rope_parameters"),
            *("rms_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id"),
        )
        values = {name: getattr(preset, name) for name in shared}
    values.update({"bos_token_id": None, "eos_token_id": None} if isinstance(preset, str) else {})
    return LlamaConfig(**{**values, **overrides})


def dit_twin_config(config: EBTImageConfig, **overrides: Any) -> dict[str, Any]:
    """
    The Diffusion Transformer twin of an [`EBTImageConfig`]: the same width, depth, heads, patches and channels. The
    feed-forward layers of diffusers' DiT are always 4 times the width; those of an EBT with
    `intermediate_size = 4 * hidden_size` are, too.

    Args:
        config ([`EBTImageConfig`]): the config to take the shape from.
        overrides: any other argument of `diffusers.DiTTransformer2DModel`, which wins.

    Returns:
        `dict` of keyword arguments for `diffusers.DiTTransformer2DModel`.

    Raises:
        ValueError: for an image that is not square, which diffusers' DiT cannot take.

    Example:

    ```python
    >>> from ebt_transformers import EBTImageConfig
    >>> from ebt_transformers.configuration.twins import dit_twin_config

    >>> config = EBTImageConfig.from_preset("4xs", image_size=32, patch_size=4)
    >>> values = dit_twin_config(config)
    >>> values["sample_size"], values["num_layers"], values["attention_head_dim"]
    (32, 2, 64)
    ```
    """
    height, width = config.height_and_width
    if height != width:
        raise ValueError(f"The DiT twin takes square images only, got `image_size` {height} x {width}.")
    values: dict[str, Any] = {
        "num_attention_heads": config.num_attention_heads,
        "attention_head_dim": config.hidden_size // config.num_attention_heads,
        "num_layers": config.num_hidden_layers,
        "in_channels": config.num_channels,
        "out_channels": config.num_channels,
        "sample_size": height,
        "patch_size": config.patch_size,
        "norm_eps": config.layer_norm_eps,
        "norm_type": "ada_norm_zero",
        # no classes: label 0 is then the "no class" of guidance, and training drops no labels
        "num_embeds_ada_norm": 0,
    }
    return {**values, **overrides}


__all__ = ["dit_twin_config", "transformer_pp_config"]
