"""How a model learns: training arguments, the trainer, text data, model cards and the training scripts."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .arguments import EBTImageTrainingArguments, EBTTrainingArguments
    from .trainer import EBTTrainer, find_last_checkpoint

_HOME = {
    "EBTImageTrainingArguments": ".arguments",
    "EBTTrainer": ".trainer",
    "EBTTrainingArguments": ".arguments",
    "find_last_checkpoint": ".trainer",
}


def __getattr__(name: str) -> Any:
    # on first use, so that `ebt train clm --help` does not wait for the Trainer to be imported
    if name in _HOME:
        return getattr(import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["EBTImageTrainingArguments", "EBTTrainer", "EBTTrainingArguments", "find_last_checkpoint"]
