"""Prints constraints.txt for what is installed in the running environment (`make constraints`).

Left out: the project itself, pip, and the local part of a version ("+cpu"). A release that needs a newer Python than
the project does is pinned only where it can be installed; an older Python takes the newest release that fits.
"""

from __future__ import annotations

import re
from importlib import metadata


OLDEST_PYTHON = (3, 10)
LEFT_OUT = {"ebt-transformers", "pip"}


def constraint(distribution: metadata.Distribution) -> str:
    """Return the line that pins `distribution` to its installed version."""
    line = f"{distribution.name}=={distribution.version.split('+')[0]}"
    bound = re.search(r">=\s*3\.(\d+)", distribution.metadata.get("Requires-Python") or "")
    if bound and (3, int(bound[1])) > OLDEST_PYTHON:
        line += f' ; python_version >= "3.{bound[1]}"'
    return line


if __name__ == "__main__":
    found = {distribution.name.lower(): distribution for distribution in metadata.distributions()}
    print("# The exact versions that `make` and CI install. Written by `make constraints`; the package itself asks")
    print("# for lower bounds only (pyproject.toml).")
    for name in sorted(found.keys() - LEFT_OUT):
        print(constraint(found[name]))
