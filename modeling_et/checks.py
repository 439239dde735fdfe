"""Re-export, so that model files import siblings only; a saved checkpoint carries the real file of this name."""

from ebt_transformers.modeling_ebt.checks import check_energies, check_image_values, check_images


__all__ = ["check_energies", "check_image_values", "check_images"]
