"""What all Energy-Based Transformers share as Hugging Face models."""

import functools
from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel


class EBTBasePreTrainedModel(PreTrainedModel):
    """A `PreTrainedModel` whose forward pass takes gradients itself."""

    supports_gradient_checkpointing = True
    _supports_sdpa = True
    # fused kernels other than sdpa's have no path for a descent
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **kwargs: Any
    ) -> None:
        # the reentrant kind refuses functions that take a gradient themselves, as every thinking step does
        function = functools.partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, function, **kwargs)


__all__ = ["EBTBasePreTrainedModel"]
