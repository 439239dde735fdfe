"""Energy-Based Transformers for the Hugging Face ecosystem. Importing registers every model with the Auto classes."""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"


def _is_console_script() -> bool:
    return os.path.basename(getattr(sys, "argv", [""])[0]) in ("ebt", "ebt.exe")


def __getattr__(name: str) -> Any:
    # reached under the console script only: there, the first use of a public name imports and registers everything
    if not name.startswith("_"):
        exports = import_module(".exports", __name__)
        if name in exports.__all__:
            return getattr(exports, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# `ebt --help` has to answer before torch is imported; everybody else gets the Auto classes with the import
if TYPE_CHECKING or not _is_console_script():
    from .exports import *  # noqa: F403
    from .exports import __all__ as __all__
