"""
Quality of images and texts, and what energies say, as `evaluate` modules, loaded by path and therefore offline. Needs
the extra `evaluate`.

| module | what it measures |
|---|---|
| `psnr`, `ssim` | how near images are to their references |
| `ebt_perplexity` | texts under a model, by number of thinking steps |
| `ebt_energy_gap` | how far thinking lowers the energy |
| `ebt_energy_auroc` | how well energies tell what is out of distribution |

Example:

```python
>>> import evaluate
>>> import numpy as np
>>> from ebt_transformers.metrics import metric_path

>>> psnr = evaluate.load(metric_path("psnr"))
>>> image = np.full((16, 16, 3), 100, dtype=np.uint8)
>>> round(psnr.compute(predictions=[image + 10], references=[image])["psnr"], 2)
28.13
```
"""

from pathlib import Path


def metric_path(name: str) -> str:
    """
    The folder of an `evaluate` module of this package, to be given to `evaluate.load`.

    Args:
        name (`str`): of a module, such as `"psnr"` or `"ebt_perplexity"`.

    Returns:
        `str`: the folder.

    Raises:
        ValueError: for an unknown name, listing the known ones.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from ebt_transformers.metrics import metric_path

    >>> Path(metric_path("ssim")).name
    'ssim'
    ```
    """
    here = Path(__file__).resolve().parent
    names = sorted(file.stem for file in here.glob("*/*.py") if file.stem == file.parent.name)
    if name not in names:
        raise ValueError(f"Unknown metric {name!r}. Allowed: {', '.join(names)}.")
    return str(here / name)


__all__ = ["metric_path"]
