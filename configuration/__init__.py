"""What a model is, as typed data."""

from .configuration_ebt import EBTConfig
from .configuration_ebt_image import EBTImageConfig
from .configuration_energy_transformer import EnergyTransformerConfig
from .presets_ebt import PRESETS, RECIPES, Preset
from .thinking_ebt import FLAT_THINKING_NAMES, ThinkingConfig
from .twins import transformer_pp_config


__all__ = [
    "FLAT_THINKING_NAMES",
    "PRESETS",
    "RECIPES",
    "EBTConfig",
    "EBTImageConfig",
    "EnergyTransformerConfig",
    "Preset",
    "ThinkingConfig",
    "transformer_pp_config",
]
