"""Re-export, so that model files import siblings only; a saved checkpoint carries the real file of this name."""

from ebt_transformers.configuration.configuration_energy_transformer import EnergyTransformerConfig


__all__ = ["EnergyTransformerConfig"]
