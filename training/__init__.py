"""How a model learns: training arguments, the trainer, text, images and graphs, model cards and training scripts."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .arguments import EBTImageTrainingArguments, EBTTrainingArguments
    from .arguments_et import EnergyTransformerTrainingArguments
    from .graph_data import GraphCollator
    from .trainer import EBTTrainer, find_last_checkpoint

_HOME = {
    "EBTImageTrainingArguments": ".arguments",
    "EBTTrainer": ".trainer",
    "EBTTrainingArguments": ".arguments",
    "EnergyTransformerTrainingArguments": ".arguments_et",
    "GraphCollator": ".graph_data",
    "find_last_checkpoint": ".trainer",
}


def __getattr__(name: str) -> Any:
    # on first use, so that `ebt train clm --help` does not wait for the Trainer to be imported
    if name in _HOME:
        return getattr(import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "EBTImageTrainingArguments",
    "EBTTrainer",
    "EBTTrainingArguments",
    "EnergyTransformerTrainingArguments",
    "GraphCollator",
    "find_last_checkpoint",
]
