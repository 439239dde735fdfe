"""Re-export, so that model files import siblings only; a saved checkpoint carries the real file of this name."""

from ebt_transformers.modeling_ebt.positions import sincos_positions


__all__ = ["sincos_positions"]
