"""The images of benchmarks/completion.py and what is masked of them. Not a script."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from completers.fillings import pixel_mask
from completers.training import config_with
from denoisers.pictures import load_pictures
from torch import Tensor

from ebt_transformers import EnergyTransformerConfig
from ebt_transformers.modeling_et.completion_et import draw_masks


MASK_SEED = 0  # every method is judged with the same masks


@dataclass(frozen=True)
class Data:
    """
    Images of one size, bytes `(B, C, H, W)`, and the masks `(B, N)` of those to judge on.

    Args:
        train, validation, test (`torch.ByteTensor`): to learn from, to pick settings on, to judge on.
        validation_mask, test_mask (`torch.BoolTensor`): what is masked of them.
        patch (`int`): side of a patch.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    validation_mask: Tensor
    test_mask: Tensor
    patch: int

    def hidden(self, mask: Tensor) -> Tensor:
        """Masked pixels (B, 1, H, W)."""
        return pixel_mask(mask, (self.test.shape[2], self.test.shape[3]), self.patch)


def load_data(options: argparse.Namespace, config: EnergyTransformerConfig) -> tuple[Data, dict[str, Any]]:
    """The images, and what identifies them."""
    how = (config.height_and_width, config.num_channels)
    limit = None if options.train_images is None else options.train_images + options.validation_images
    both = load_pictures(options.data, *how, limit=limit)
    test = load_pictures(options.test_data, *how, limit=options.test_images)
    if len(both) <= options.validation_images:
        raise ValueError(
            f"Of the {len(both)} images of {Path(options.data).name} {options.validation_images} are for picking "
            "settings; none is left. Give fewer --validation-images."
        )
    train, validation = both[options.validation_images :], both[: options.validation_images]
    # what is masked is what counts: in training some of it may stay visible, here nothing does
    whole = config_with(config, visible_ratio=0.0)
    masks = [draw_masks(whole, len(each), torch.Generator().manual_seed(MASK_SEED))[0] for each in (validation, test)]
    about = {"train": train.fingerprint, "test": test.fingerprint, "train_images": len(train)}
    about |= {"validation_images": len(validation), "test_images": len(test)}
    return Data(train.pixels, validation.pixels, test.pixels, masks[0], masks[1], config.patch_size), about


__all__ = ["MASK_SEED", "Data", "load_data"]
