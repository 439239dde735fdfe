"""Re-export, so that model files import siblings only; a saved checkpoint carries the real file of this name."""

from ebt_transformers.configuration.base_ebt import EBTBaseConfig


__all__ = ["EBTBaseConfig"]
