"""Texts of any length as batches of windows that a model can read, in which every scored token is predicted once."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os.path import commonprefix

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class EncodedText:
    """
    The tokens of a text, and which of them are scored.

    Args:
        ids (`list[int]`): all of them, with the token the text starts from.
        first (`int`): those from here on are scored; at least 1, because the first has nothing before it.
    """

    ids: list[int]
    first: int = 1


@dataclass(frozen=True)
class Window:
    """A piece of a text: its last `scored` tokens are predicted here."""

    text: int
    ids: list[int]
    scored: int


def _windows(text: int, encoded: EncodedText, length: int) -> Iterator[Window]:
    """Every scored token is predicted once, from as much before it as the window's inputs (`length`) hold."""
    begin, total = encoded.first, len(encoded.ids)
    end = max(length + 1, begin + length // 2)  # a continuation's first tokens see half a context of the prompt
    while begin < total:
        end = min(end, total)
        yield Window(text, encoded.ids[max(end - 1 - length, 0) : end], end - begin)
        begin, end = end, end + length


def _start(tokenizer: PreTrainedTokenizerBase, add_start_token: bool) -> list[int]:
    """What a text starts from: the bos token, or else the eos token; nothing if that is not wanted."""
    if not add_start_token:
        return []
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token]
    raise ValueError(
        "The tokenizer has no bos and no eos token that a text could start from: set `add_start_token=False`, and the "
        "first token of every text is not scored."
    )


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], add_start_token: bool = True
) -> list[EncodedText]:
    """
    Texts of which every token is scored (without a start token: every one but the first).

    Args:
        tokenizer: of the model.
        texts (sequence of `str`): of any lengths.
        add_start_token (`bool`, *optional*, defaults to `True`): put the bos token (the eos token, if there is none)
            in front.

    Raises:
        ValueError: for no texts, a text without a token to predict, and a tokenizer without bos and eos token.

    Example:

    ```python
    >>> from transformers import AutoTokenizer
    >>> from ebt_transformers.assets import checkpoint_path
    >>> from ebt_transformers.pipelines.text_windows import encode_texts

    >>> encode_texts(AutoTokenizer.from_pretrained(checkpoint_path()), ["To be"])
    [EncodedText(ids=[0, 398, 306], first=1)]
    ```
    """
    if isinstance(texts, str) or len(texts) == 0:
        raise ValueError(f"Give a list of at least one text, got {texts!r}.")
    start = _start(tokenizer, add_start_token)
    encoded = [EncodedText(start + _ids(tokenizer, text)) for text in texts]
    for number, (text, one) in enumerate(zip(texts, encoded, strict=True)):
        if len(one.ids) < 2:
            raise ValueError(
                f"Text {number} has no token to predict{'' if start else ' (the first is not)'}: {text!r}."
            )
    return encoded


def encode_continuations(
    tokenizer: PreTrainedTokenizerBase, prompt: str, continuations: Sequence[str], add_start_token: bool = True
) -> list[EncodedText]:
    """
    Continuations of a prompt, each encoded together with it. Scored are the tokens from the first on that the prompt
    alone does not have: a token that begins in the prompt and ends in the continuation belongs to the continuation.

    Args:
        tokenizer, add_start_token: as for [`encode_texts`].
        prompt (`str`): what is continued; may be empty.
        continuations (sequence of `str`): of any lengths.

    Raises:
        ValueError: for no continuations, one without a token to predict, and a tokenizer without bos and eos token.

    Example:

    ```python
    >>> from transformers import AutoTokenizer
    >>> from ebt_transformers.assets import checkpoint_path
    >>> from ebt_transformers.pipelines.text_windows import encode_continuations

    >>> tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
    >>> encode_continuations(tokenizer, "To", [" be", " be or"])
    [EncodedText(ids=[0, 398, 306], first=2), EncodedText(ids=[0, 398, 306, 531], first=2)]
    ```
    """
    if isinstance(continuations, str) or len(continuations) == 0:
        raise ValueError(f"Give a list of at least one continuation, got {continuations!r}.")
    start = _start(tokenizer, add_start_token)
    alone = start + _ids(tokenizer, prompt)
    encoded = []
    for number, continuation in enumerate(continuations):
        ids = start + _ids(tokenizer, prompt + continuation)
        first = max(len(commonprefix([alone, ids])), 1)
        if first >= len(ids):
            raise ValueError(f"Continuation {number} has no token to predict: {continuation!r} after {prompt!r}.")
        encoded.append(EncodedText(ids, first))
    return encoded


def _context(model: PreTrainedModel, max_length: int | None) -> int:
    """How many tokens a window may give the model."""
    longest = getattr(model.config, "max_position_embeddings", None)
    if max_length is None and longest is None:
        raise ValueError("The model's config names no longest context (`max_position_embeddings`): give `max_length`.")
    wanted = longest if max_length is None else max_length
    if not isinstance(wanted, int) or wanted < 1 or (longest is not None and wanted > longest):
        allowed = "at least 1" if longest is None else f"between 1 and the model's context of {longest}"
        raise ValueError(f"`max_length` must be an integer {allowed}, got {max_length!r}.")
    return wanted


def batched(
    model: PreTrainedModel, encoded: Sequence[EncodedText], batch_size: int, max_length: int | None = None
) -> list[list[Window]]:
    """
    The windows of all texts; those of similar length together, so that there is little padding. The windows of one
    text stay in order.

    Raises:
        ValueError: for a `batch_size` below 1, and a `max_length` beyond the model's context.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size!r}.")
    length = _context(model, max_length)
    windows = [window for number, one in enumerate(encoded) for window in _windows(number, one, length)]
    windows.sort(key=lambda window: -len(window.ids))  # stable, and no window of a text is longer than one before it
    return [windows[first : first + batch_size] for first in range(0, len(windows), batch_size)]


def tensors(batch: Sequence[Window], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, attention mask and the tokens to predict (-100: none), all (B, S)."""
    shape = (len(batch), max(len(window.ids) for window in batch) - 1)
    inputs, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    targets = torch.full(shape, -100)
    for row, window in enumerate(batch):
        last = len(window.ids) - 1
        inputs[row, :last] = torch.tensor(window.ids[:-1])
        mask[row, :last] = 1
        targets[row, last - window.scored : last] = torch.tensor(window.ids[-window.scored :])
    return inputs.to(device), mask.to(device), targets.to(device)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """No gradients of parameters, and the model in evaluation mode for the while."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


__all__ = ["EncodedText", "Window", "batched", "encode_continuations", "encode_texts", "evaluating", "tensors"]
