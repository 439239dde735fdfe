"""The Transformer++ twin: the ordinary language model of the same shape an EBT is compared with."""

from typing import Any

from transformers import LlamaConfig

from .configuration_ebt import EBTConfig
from .presets_ebt import preset_fields


def transformer_pp_config(preset: str | EBTConfig, **overrides: Any) -> LlamaConfig:
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


__all__ = ["transformer_pp_config"]
