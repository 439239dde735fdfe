"""What all Energy-Based Transformers share as Hugging Face models."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel


MODEL_TAGS = ("ebt", "energy-based-model")  # what the Hub lists our models under
HUB_TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageToImage": "image-to-image",
    "AutoModelForMaskedImageModeling": "image-to-image",  # the Hub knows no nearer task
    "AutoModelForSequenceClassification": "graph-ml",
    "AutoModelForTokenClassification": "graph-ml",
}


def own_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The class a model was made with: FSDP2 puts one of torch's in its place."""
    return next(owner for owner in type(model).__mro__ if not owner.__module__.startswith("torch."))


def complete_card(path: Path, task: str | None) -> None:
    """Adds to the head of a card what the Hub finds and loads a model by, where the card does not say it itself."""
    card = ModelCard.load(path)
    card.data.library_name = card.data.library_name or "transformers"
    card.data.pipeline_tag = card.data.pipeline_tag or task
    card.save(path)


class EBTBasePreTrainedModel(PreTrainedModel):
    """
    A `PreTrainedModel` whose forward pass takes gradients itself.

    What is pushed to the Hub has a card with the tags `ebt` and `energy-based-model`, the library and the task; a card
    that is there already keeps its text and its own values.
    """

    supports_gradient_checkpointing = True
    _supports_sdpa = True
    # fused kernels other than sdpa's have no path for a descent
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False

    def __init__(self, config: PreTrainedConfig, *inputs: Any, **kwargs: Any) -> None:
        super().__init__(config, *inputs, **kwargs)
        self.model_tags = list(MODEL_TAGS)  # the model's own: `add_model_tags` and `push_to_hub` change it in place

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **kwargs: Any
    ) -> None:
        # the reentrant kind refuses functions that take a gradient themselves, as every thinking step does
        function = functools.partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, function, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """
        [`PreTrainedModel.save_pretrained`], with the code of the model, also of one that FSDP2 has distributed.

        Args:
            save_directory (`str` or `PathLike`): a folder, made if need be.
            kwargs: of the parent. A distributed model's whole weights are given as `state_dict`, as
                `Trainer` and accelerate do.
        """
        # FSDP2 gives a model a new class in a module of torch, whose files would be saved as the model's code
        distributed = self.__class__
        self.__class__ = own_class(self)
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.__class__ = distributed

    def _upload_modified_files(self, working_dir: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        # all ways to the Hub lead through here, with the card written: transformers' own does not name the task
        complete_card(Path(working_dir) / "README.md", HUB_TASKS.get(str(self._auto_class)))
        return super()._upload_modified_files(working_dir, *args, **kwargs)


__all__ = ["HUB_TASKS", "MODEL_TAGS", "EBTBasePreTrainedModel", "complete_card", "own_class"]
