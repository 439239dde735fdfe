"""What commands and benchmarks print: tables, the machine and the versions a result belongs to."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


LIBRARIES = (
    *("torch", "transformers", "accelerate", "datasets", "peft", "tokenizers", "huggingface-hub", "safetensors"),
    *("diffusers", "evaluate", "trl", "lm_eval", "gradio"),
)
NOT_INSTALLED = "not installed"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """
    A markdown table that also reads well as it is: the first column is aligned to the left, the others to the right.

    Args:
        header (sequence of `str`): names of the columns.
        rows (sequence of sequences of `str`): cells.
    """
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        aligned = (
            f"{cell:{'<' if n == 0 else '>'}{width}}"
            for n, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join(aligned) + " |"

    rule = ["-" * width if n == 0 else "-" * (width - 1) + ":" for n, width in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def of_steps(count: int) -> str:
    """A number of steps in words."""
    return f"{count} step{'s' if count != 1 else ''}"


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return NOT_INSTALLED


def processor_name() -> str:
    """The processor's model name, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment() -> dict[str, str]:
    """Versions and devices, as bug reports and benchmark tables need them. Imports torch."""
    import torch

    from . import __version__

    facts = {"ebt_transformers": __version__, "python": platform.python_version(), "platform": platform.platform()}
    facts["processor"] = f"{processor_name()}, {usable_cores()} cores"
    facts |= {name.replace("-", "_"): _installed(name) for name in LIBRARIES}
    facts["torch"] = torch.__version__
    facts["torch threads"] = str(torch.get_num_threads())
    facts["cuda"] = "not available"
    if torch.cuda.is_available():
        facts["cuda"] = f"{torch.version.cuda}, {torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return facts


__all__ = ["environment", "of_steps", "processor_name", "table", "usable_cores"]
