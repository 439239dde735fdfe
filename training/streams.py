"""
Endless passes over a stream, so that a run does not depend on where a pass ends.

The Trainer takes a stream for one long epoch. If it ended, a resumed run would start its second pass anew, and batches
would fall otherwise with every number of processes. So training streams never end: they start over by themselves,
shuffled anew.
"""

from collections.abc import Callable, Iterator
from inspect import signature
from itertools import count
from typing import Any, TypeVar

import numpy as np
import torch


Row = TypeVar("Row")


def shuffled(source: Any, seed: int, epoch: int, buffer_size: int) -> Any:
    """
    A stream in the order of one pass.

    Args:
        source (`datasets.IterableDataset`): the stream.
        seed (`int`), epoch (`int`): what the order follows from.
        buffer_size (`int`): rows shuffled at a time (shards are shuffled too); 0 keeps the order.
    """
    if not buffer_size:
        return source
    # not `set_epoch`: its number is shared by all dataloader workers, of which some are a pass ahead
    options: dict[str, Any] = {"generator": np.random.default_rng([seed, epoch]), "buffer_size": buffer_size}
    # newer `datasets` read several files at once, and wait for seconds at the end of a pass: not for a single file
    if "max_buffer_input_shards" in signature(source.shuffle).parameters and source.num_shards == 1:
        options["max_buffer_input_shards"] = 1
    return source.shuffle(**options)


def endless(one_pass: Callable[[int], Iterator[Row]]) -> Iterator[Row]:
    """
    One pass after the other, without end.

    Args:
        one_pass (`Callable[[int], Iterator]`): the rows of a pass, whose number it is given.

    Raises:
        ValueError: if a pass has no rows.
    """
    for epoch in count():
        empty = True
        for row in one_pass(epoch):
            empty = False
            yield row
        if empty and torch.utils.data.get_worker_info() is not None:
            return  # more dataloader workers than files: nothing to read for this one
        if empty:
            raise ValueError("The stream holds nothing to train on. Check the files, the split or the column.")


__all__ = ["endless", "shuffled"]
