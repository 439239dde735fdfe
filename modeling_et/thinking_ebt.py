"""Re-export, so that model files import siblings only; a saved checkpoint carries the real file of this name."""

from ebt_transformers.configuration.thinking_ebt import FLAT_PREFIX, ThinkingConfig


__all__ = ["FLAT_PREFIX", "ThinkingConfig"]
