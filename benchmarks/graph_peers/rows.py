"""Words and numbers of rows, for the benchmarks on graphs. Not a script."""

import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def installed(name: str) -> str:
    """The version of a library."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def mean_std(values: Sequence[float]) -> str:
    """Mean and standard deviation (of the sample), with one decimal."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.1f} ± {spread:.1f}"


def settings_text(setting: Mapping[str, Any]) -> str:
    """Settings as `name value, name value`."""
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in setting.items()
    )


__all__ = ["installed", "mean_std", "settings_text"]
