"""Re-export, so that model files import siblings only; a saved checkpoint carries the real file of this name."""

from ebt_transformers.modeling_ebt.descent import DescentOutput, DescentStep, StopRules, descend, standard_normal


__all__ = ["DescentOutput", "DescentStep", "StopRules", "descend", "standard_normal"]
