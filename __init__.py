"""Energy-Based Transformers for the Hugging Face ecosystem. Importing registers every model with the Auto classes."""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

# public names that need more than a model does; imported when they are first used
_LATER = {
    "EBTDenoisingPipeline": ".pipelines.diffusers_denoising",
    "EBTImageTrainingArguments": ".training",
    "EBTTrainer": ".training",
    "EBTTrainingArguments": ".training",
    "generate_with_energies": ".pipelines",
    "model_from_official": ".modeling_ebt.conversion_ebt",
    "model_to_official": ".modeling_ebt.conversion_ebt",
    "perplexity_by_steps": ".pipelines",
}


def _is_console_script() -> bool:
    return os.path.basename(getattr(sys, "argv", [""])[0]) in ("ebt", "ebt.exe")


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name], __name__), name)
    # under the console script the other names wait, too, until somebody uses one; that registers everything
    if not name.startswith("_"):
        exports = import_module(".exports", __name__)
        if name in exports.__all__:
            return getattr(exports, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})


# `ebt --help` has to answer before torch is imported; everybody else gets the Auto classes with the import
if TYPE_CHECKING or not _is_console_script():
    from .exports import *  # noqa: F403
    from .exports import __all__ as __all__
