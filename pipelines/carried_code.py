"""The code that a saved pipeline carries, so that it loads where this package is not installed."""

import re
import sys
from pathlib import Path


RELATIVE_IMPORT = re.compile(r"^(\s*from )(\.+)([\w.]+)(?= import )", re.MULTILINE)


def carry_code(module: str, folder: Path) -> list[Path]:
    """
    Copies a module and all modules it imports relatively, wherever they are, side by side into one folder, as code of
    a checkpoint has to lie. transformers does so itself, but for modules that are side by side already.

    Args:
        module (`str`): name of an imported module; it and those it imports name modules, not packages, in
            their relative imports, and no two files have one name.
        folder (`Path`): where to.

    Returns:
        `list[Path]`: the files written.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> import ebt_transformers.pipelines.image_denoising
    >>> from ebt_transformers.pipelines.carried_code import carry_code

    >>> files = carry_code("ebt_transformers.pipelines.image_denoising", Path(tempfile.mkdtemp()))
    >>> [file.name for file in files][:3]
    ['image_denoising.py', 'noise_ebt.py', 'thinking_ebt.py']
    ```
    """
    waiting, done = [Path(str(sys.modules[module].__file__))], {}
    while waiting:
        source = waiting.pop(0)
        if source.name in done:
            continue
        code = source.read_text(encoding="utf-8")
        for _, dots, name in RELATIVE_IMPORT.findall(code):
            waiting.append(source.parents[len(dots) - 1].joinpath(*name.split(".")).with_suffix(".py"))
        done[source.name] = RELATIVE_IMPORT.sub(lambda found: f"{found[1]}.{found[3].rpartition('.')[2]}", code)
    for filename, code in done.items():
        (folder / filename).write_text(code, encoding="utf-8")
    return [folder / filename for filename in done]


__all__ = ["carry_code"]
