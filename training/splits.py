"""Which rows of a data set train, validate and test a model: splits by name, parts of them, and the usual names."""

from collections.abc import Mapping
from typing import Any


SPLITS = ("train", "validation", "test")
# what data sets call their splits; the first one is ours
USUAL_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


def is_stream(source: Any) -> bool:
    """Whether a source is read while training: it has no length."""
    return not hasattr(source, "__len__")


def choose_splits(available: Mapping[str, Any], wanted: Mapping[str, str | None] | None = None) -> dict[str, Any]:
    """
    The rows to train on, to validate with and to test with.

    Args:
        available (mapping of split name to rows): what a data set has: lists, `datasets` tables, or streams.
        wanted (mapping of `train`, `validation` and `test` to `str`, *optional*):
            Which split to take for each, by the name the data set gives it, or parts of splits as everywhere in
            `datasets`: `"train[:1%]"`, `"train[1000:]"`, `"train+extra"`. `None` takes the split of the usual name
            (`validation` is also called `valid`, `val` or `dev`) that no other was taken from.

    Returns:
        `dict` with `train`, and `validation` and `test` where there are some.

    Raises:
        ValueError: for a split that does not exist, is empty, or could be one of several, and for parts of a stream.

    Example:

    ```python
    >>> from ebt_transformers.training.splits import choose_splits

    >>> choose_splits({"train": ["a", "b", "c", "d"], "dev": ["e"]}, {"train": "train[:50%]"})
    {'train': ['a', 'b'], 'validation': ['e']}
    ```
    """
    asked = {role: spec for role, spec in (wanted or {}).items() if spec is not None}
    unknown = sorted(set(asked) - set(SPLITS))
    if unknown:
        raise ValueError(f"Splits are chosen for {', '.join(SPLITS)}, got {', '.join(unknown)}.")
    chosen = {role: _rows(available, spec, role) for role, spec in asked.items()}
    taken = {name for spec in asked.values() for name in _names(spec)}
    for role in SPLITS:
        usual = [name for name in USUAL_NAMES[role] if name in available and name not in taken]
        if role in chosen or not usual:
            continue
        if len(usual) > 1:
            raise ValueError(f"Both {' and '.join(usual)} look like {role} data. Choose one with `{role}_split`.")
        chosen[role] = available[usual[0]]
    if "train" not in chosen:
        raise ValueError(
            f"There is no split 'train'. Splits: {', '.join(available)}. Choose one to train on with `train_split`."
        )
    return {role: chosen[role] for role in SPLITS if role in chosen}


def _names(spec: str) -> list[str]:
    """The splits that `train[:10%]+extra` is made of."""
    return [part.partition("[")[0].strip() for part in spec.split("+")]


def _rows(available: Mapping[str, Any], spec: str, role: str) -> Any:
    """The rows that a specification names."""
    missing = [name for name in _names(spec) if name not in available]
    if missing:
        raise ValueError(f"`{role}_split` {spec!r}: no split {missing[0]!r}. Splits: {', '.join(available)}.")
    if spec in available:
        return available[spec]
    if any(is_stream(available[name]) for name in _names(spec)):
        raise ValueError(
            f"`{role}_split` {spec!r}: a stream has no parts. Name one whole split; `max_train_samples` and "
            "`max_eval_samples` take its beginning."
        )
    from datasets import ReadInstruction, concatenate_datasets

    lengths = {name: len(rows) for name, rows in available.items()}
    try:
        parts = [
            available[part.splitname][part.from_ : part.to]
            if isinstance(available[part.splitname], list)
            else available[part.splitname].select(range(part.from_, part.to))
            for part in ReadInstruction.from_spec(spec).to_absolute(lengths)
        ]
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"`{role}_split` {spec!r} is no part of a split: {error} Write for instance train[:10%] or train[1000:]."
        ) from error
    if not sum(len(part) for part in parts):
        raise ValueError(f"`{role}_split` {spec!r} holds nothing. Rows: {lengths}.")
    return [row for part in parts for row in part] if isinstance(parts[0], list) else concatenate_datasets(parts)


__all__ = ["SPLITS", "USUAL_NAMES", "choose_splits", "is_stream"]
