"""
The replay buffer of recipe s2: finished predictions come back later as the start of another descent.

Shapes: ``B`` rows of a batch, ``T`` positions, ``V`` vocabulary, ``R`` replayed rows.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


STATE = "state"  # of a stored row: the logits its descent ended at, (T, V)
REPLAYED = "replayed_states"  # in a batch: those of its last rows, one (T, V) each
GENERATOR = "generator"
GIB = 1024**3

# what fills a row up to the length of the others; nothing is predicted there, and nobody looks there
FILL = {"labels": -100, "shift_labels": -100}

Row = dict[str, Tensor]
Batch = dict[str, Any]


class ReplayBuffer:
    """
    The last rows that were trained on, each with the logits its descent ended at. The oldest make way for new ones.

    Args:
        size (`int`): rows it holds at most.
        share (`float`): rows drawn for each new row.
        seed (`int`): of the draws, which touch no other random numbers.
        device (`torch.device` or `str`): where the rows are kept.
        memory (`float`, *optional*, defaults to infinity): GiB that `size` rows may take. With logits in float32 that
            is `size x T x (4 V + bytes of the token ids, labels, ...)`; 192 rows of 256 tokens over a vocabulary of
            50,277 take 9.2 GiB. Rows drawn for the current update live until its end, even where they are the oldest.

    Example:

    ```python
    >>> import torch
    >>> from ebt_transformers.training.replay_buffer import ReplayBuffer

    >>> buffer = ReplayBuffer(size=8, share=0.5, seed=33, device="cpu")
    >>> ids = torch.arange(12).view(4, 3)
    >>> buffer.add({"input_ids": ids, "labels": ids}, torch.zeros(4, 3, 12))
    >>> [batch] = buffer.extend([{"input_ids": ids, "labels": ids}])
    >>> len(buffer), batch["input_ids"].shape, len(batch["replayed_states"])
    (4, torch.Size([6, 3]), 2)
    ```
    """

    def __init__(
        self, size: int, share: float, seed: int, device: torch.device | str, memory: float = float("inf")
    ) -> None:
        self.share = share
        self.device = torch.device(device)
        self.memory = memory
        self.rows: deque[Row] = deque(maxlen=size)
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def size(self) -> int:
        """Rows it holds at most."""
        return self.rows.maxlen or 0

    @property
    def nbytes(self) -> int:
        """Bytes it holds now."""
        return sum(value.nbytes for row in self.rows for value in row.values())

    def nbytes_when_full(self, batch: Mapping[str, Any], vocab_size: int) -> int:
        """Bytes it holds once full of rows like those of `batch`, the tensors of a batch (B, T, ...)."""
        tensors = _row_tensors(batch)
        length = max(value.shape[1] for value in tensors.values())
        return self.size * (length * vocab_size * 4 + sum(value[0].nbytes for value in tensors.values()))

    def check_memory(self, batches: Sequence[Mapping[str, Any]], vocab_size: int) -> None:
        """
        Raises before a run stores what it has no room for.

        Args:
            batches (`Sequence[Mapping]`): of one update, before anything is replayed.
            vocab_size (`int`): V.

        Raises:
            ValueError: if a buffer full of such rows would be larger than `memory`, with the size that fits; and for a
                batch that is not made of rows.
        """
        needed = max(self.nbytes_when_full(batch, vocab_size) for batch in batches)
        if needed > self.memory * GIB:
            fits = int(self.memory * GIB * self.size / needed)
            raise ValueError(
                f"The replay buffer would take {needed / GIB:.2f} GiB on {self.device}: {self.size} rows with logits "
                f"over {vocab_size} tokens at every position. `replay_buffer_memory` allows {self.memory:g} GiB. Set "
                f"`replay_buffer_size` to at most {fits}, allow more, or keep it elsewhere (`replay_buffer_device`)."
            )

    def draw(self, wanted: int) -> list[Row]:
        """Different stored rows at random, as many as there are up to `wanted`."""
        order = torch.randperm(len(self.rows), generator=self.generator)[:wanted]
        return [self.rows[index] for index in order.tolist()]

    def extend(self, batches: Sequence[Mapping[str, Any]]) -> list[Batch]:
        """
        The batches of one update with stored rows behind their own. All are drawn at once, so that one batch of eight
        and two of four replay the same rows.

        Args:
            batches (`Sequence[Mapping]`): dicts of tensors (B, T); rows may be padded to different lengths.

        Returns:
            A list of dicts. A batch that got rows is longer by R and has their logits as `replayed_states`, a list.
        """
        counts = [len(next(iter(_row_tensors(batch).values()))) for batch in batches]
        rows = self.draw(int(self.share * sum(counts)))
        extended, seen, start = [], 0, 0
        for batch, count in zip(batches, counts, strict=True):
            seen += count
            stop = int(self.share * seen)
            extended.append(_with_rows(batch, rows[start:stop]))
            start = stop
        return extended

    def add(self, batch: Mapping[str, Any], states: Tensor) -> None:
        """
        Stores the first rows of a batch.

        Args:
            batch (`Mapping`): tensors of at least B rows.
            states (`Tensor` of shape `(B, T, V)`): the logits their descent ended at.
        """
        tensors = {**_row_tensors(batch), STATE: states.detach()}
        for index, length in enumerate(_lengths(tensors, len(states))):
            # copies: a view would keep the logits of the whole batch alive
            row = {name: value[index, :length].to(self.device, copy=True) for name, value in tensors.items()}
            self.rows.append(row)

    def save(self, path: str | Path) -> None:
        """
        Writes rows and the state of the draws as safetensors.

        Raises:
            OSError: if the file cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors = {f"{index}.{name}": value for index, row in enumerate(self.rows) for name, value in row.items()}
        try:
            save_file({**tensors, GENERATOR: self.generator.get_state()}, path, {"rows": str(len(self.rows))})
        except SafetensorError as error:  # a full disk too, and no OSError
            raise OSError(f"The replay buffer could not be written to {path}: {error}") from error

    def load(self, path: str | Path) -> None:
        """Reads what [`save`] wrote; a smaller buffer keeps the newest rows."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            count = int(file.metadata()["rows"])
            names = [name.partition(".")[2] for name in file.keys() if name.startswith("0.")]  # noqa: SIM118  no dict
            for index in range(max(count - self.size, 0), count):
                self.rows.append({name: file.get_tensor(f"{index}.{name}").to(self.device) for name in names})
            self.generator.set_state(file.get_tensor(GENERATOR))


def _row_tensors(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors (B, T) of a batch; raises for anything else in it."""
    tensors = {name: value for name, value in batch.items() if name != REPLAYED}
    shapes = {name: tuple(value.shape) if isinstance(value, Tensor) else value for name, value in tensors.items()}
    if (
        any(not isinstance(shape, tuple) or len(shape) != 2 for shape in shapes.values())
        or len(set(shapes.values())) != 1
    ):
        raise ValueError(
            "The replay buffer takes batches whose tensors all have the shape (rows, positions), got "
            f"{shapes}. Change the collator, or set `replay_buffer_size=0`."
        )
    return tensors


def _lengths(tensors: Mapping[str, Tensor], count: int) -> list[int]:
    """Positions of each of the first rows, without those that are padding on the right."""
    mask = tensors.get("attention_mask")
    if mask is None:
        return [tensors[STATE].shape[1]] * count
    positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    lengths: list[int] = (mask[:count] * positions).amax(1).tolist()
    return lengths


def _with_rows(batch: Mapping[str, Any], rows: list[Row]) -> Batch:
    """A batch with stored rows behind its own; the shorter ones are filled up on the right."""
    if not rows:
        return dict(batch)
    tensors = _row_tensors(batch)
    stored = set(rows[0]) - {STATE}
    if set(tensors) != stored:
        raise ValueError(
            f"The batch has {', '.join(sorted(tensors))}, the replayed rows {', '.join(sorted(stored))}. The collator "
            "has to give every batch the same tensors."
        )
    joined: Batch = {}
    for name, value in tensors.items():
        parts = [*value, *(row[name].to(value.device) for row in rows)]
        length = max(len(part) for part in parts)
        fill = FILL.get(name, 0)
        joined[name] = torch.stack([F.pad(part, (0, length - len(part)), value=fill) for part in parts])
    return {**joined, REPLAYED: [row[STATE] for row in rows]}


__all__ = ["REPLAYED", "ReplayBuffer"]
