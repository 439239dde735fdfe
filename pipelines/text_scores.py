"""Losses and energies of whole texts, of any length and in batches, by number of thinking steps."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..configuration import ThinkingConfig
from .perplexity import checked_steps, descends_once


@dataclass(frozen=True)
class TextLosses:
    """
    What [`text_losses`] found.

    Args:
        losses (`dict[int, list[float]]`): by number of thinking steps (0: a model without), the sum of the losses of
            the tokens of every text, in nats.
        tokens (`list[int]`): how many tokens of every text were predicted.
    """

    losses: dict[int, list[float]]
    tokens: list[int]


@dataclass(frozen=True)
class _Window:
    """A piece of a text: its last `scored` tokens are predicted here."""

    text: int
    ids: list[int]
    scored: int


def _windows(text: int, ids: list[int], length: int) -> Iterator[_Window]:
    """Every token after the first is predicted once, from as much before it as the window's inputs (`length`) hold."""
    for begin in range(1, len(ids), length):
        end = min(begin + length, len(ids))
        yield _Window(text, ids[max(end - 1 - length, 0) : end], end - begin)


def _start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise ValueError(
        "The tokenizer has no bos and no eos token that a text could start from: set `add_start_token=False`, and the "
        "first token of every text is not scored."
    )


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


def _batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    batch_size: int,
    add_start_token: bool,
    max_length: int | None,
) -> list[list[_Window]]:
    """The windows of all texts; those of similar length together, so that there is little padding."""
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    if isinstance(texts, str) or len(texts) == 0:
        raise ValueError(f"Give a list of at least one text, got {texts!r}.")
    length = _context(model, max_length)
    start = [_start_token(tokenizer)] if add_start_token else []
    windows: list[_Window] = []
    for number, text in enumerate(texts):
        ids = start + list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if len(ids) < 2:
            raise ValueError(
                f"Text {number} has no token to predict{'' if start else ' (the first is not)'}: {text!r}."
            )
        windows.extend(_windows(number, ids, length))
    windows.sort(key=lambda window: -len(window.ids))  # those of one text are all full: they stay in order
    return [windows[first : first + batch_size] for first in range(0, len(windows), batch_size)]


def _tensors(batch: Sequence[_Window], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
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


def _token_losses(
    model: PreTrainedModel, batch: tuple[Tensor, Tensor, Tensor], counts: Sequence[int], thinking: ThinkingConfig
) -> list[Tensor]:
    """Losses (B, S) after each number of steps, 0 where there is no target."""
    inputs, mask, targets = batch
    given = {"input_ids": inputs, "attention_mask": mask, "use_cache": False}
    if not hasattr(model, "energy"):
        logits = model(**given).logits.float()
        return [F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)]
    given |= {"shift_labels": targets, "loss_reduction": "none", "thinking": thinking}
    if descends_once(model, thinking):
        by_step = model(**given, thinking_steps=max(counts)).step_losses
        return [by_step[count - 1] for count in counts]
    return [model(**given, thinking_steps=count).loss for count in counts]


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """No gradients of parameters, and the model in evaluation mode for the while."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def text_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    steps: Sequence[int] = (1, 2, 4, 8),
    batch_size: int = 8,
    add_start_token: bool = True,
    max_length: int | None = None,
    thinking: ThinkingConfig | Mapping[str, Any] | None = None,
) -> TextLosses:
    """
    Losses of texts after each number of thinking steps.

    A text longer than the model's context is cut into windows, in which every token is predicted once: from all of
    the text before it in the first window, in later ones from what of the window stands before it (the last one is
    moved back to be full). This is lm_eval's `loglikelihood_rolling`, to the token.

    Args:
        model: an [`EBTForCausalLM`], or any other causal language model, which has one loss.
        tokenizer: its tokenizer.
        texts (sequence of `str`): of any lengths.
        steps (sequence of `int`, *optional*): numbers of thinking steps; ignored for models that do not think. With
            one candidate all come from a single descent.
        batch_size (`int`, *optional*, defaults to 8): windows at a time.
        add_start_token (`bool`, *optional*, defaults to `True`): predict the first token too, from the bos token (the
            eos token, if there is none).
        max_length (`int`, *optional*, defaults to the model's context): tokens of context, at most.
        thinking ([`ThinkingConfig`] or `dict`, *optional*): further options, the same for all numbers of steps.

    Returns:
        [`TextLosses`].

    Raises:
        ValueError: for no texts, a text without a token to predict, a `max_length` beyond the model's context, bad
            numbers of steps or options, and a tokenizer without bos and eos token.

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> from ebt_transformers.assets import checkpoint_path
    >>> from ebt_transformers.pipelines.text_scores import text_losses

    >>> model = AutoModelForCausalLM.from_pretrained(checkpoint_path())
    >>> tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
    >>> found = text_losses(model, tokenizer, ["To be, or not to be", "Speak, I charge thee, speak!"], steps=[1, 2])
    >>> sorted(found.losses), found.tokens
    ([1, 2], [7, 12])
    ```
    """
    counts, options = checked_steps(model, steps, thinking)
    batches = _batches(model, tokenizer, texts, batch_size, add_start_token, max_length)
    losses: dict[int, list[float]] = {count: [0.0] * len(texts) for count in counts}
    tokens = [0] * len(texts)
    with _evaluating(model):
        for batch in batches:
            by_step = _token_losses(model, _tensors(batch, model.device), counts, options)
            for count, of_tokens in zip(counts, by_step, strict=True):
                for window, loss in zip(batch, of_tokens.double().sum(1).tolist(), strict=True):
                    losses[count][window.text] += loss
            for window in batch:
                tokens[window.text] += window.scored
    return TextLosses(losses, tokens)


def text_energies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    batch_size: int = 8,
    add_start_token: bool = True,
    max_length: int | None = None,
    thinking: ThinkingConfig | Mapping[str, Any] | None = None,
) -> list[np.ndarray]:
    """
    Energies of the predictions of every token of texts, before every thinking step and after the last.

    Args:
        model ([`EBTForCausalLM`]): the model.
        tokenizer, texts, batch_size, add_start_token, max_length: as for [`text_losses`].
        thinking ([`ThinkingConfig`] or `dict`, *optional*): how to think, the number of steps included.

    Returns:
        `list[np.ndarray]`: one array of shape `(tokens, K + 1)` per text, in float32.

    Raises:
        TypeError: for a model without energies.
        ValueError: as for [`text_losses`].

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> from ebt_transformers.assets import checkpoint_path
    >>> from ebt_transformers.pipelines.text_scores import text_energies

    >>> model = AutoModelForCausalLM.from_pretrained(checkpoint_path())
    >>> tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
    >>> [array.shape for array in text_energies(model, tokenizer, ["To be, or not to be"], thinking={"steps": 4})]
    [(7, 5)]
    ```
    """
    if not hasattr(model, "energy"):
        raise TypeError(f"{type(model).__name__} has no energies: give an energy-based model (EBTForCausalLM).")
    batches = _batches(model, tokenizer, texts, batch_size, add_start_token, max_length)
    found: list[list[np.ndarray]] = [[] for _ in texts]
    with _evaluating(model):
        for batch in batches:
            inputs, mask, targets = _tensors(batch, model.device)
            output = model(
                input_ids=inputs, attention_mask=mask, use_cache=False, thinking=thinking, output_energies=True
            )
            for window, energies, target in zip(batch, output.energies, targets, strict=True):
                found[window.text].append(energies[target != -100].float().cpu().numpy())
    return [np.concatenate(parts) for parts in found]


def load_text_model(
    model: Any, tokenizer: Any = None, device: Any = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    A causal language model and its tokenizer, from what a user may give for them.

    Args:
        model (`str`, `Path`, `PreTrainedModel` or `PeftModel`): a folder, a Hub id, or the model itself.
        tokenizer (`str`, `Path` or tokenizer, *optional*): of a model given as itself; else what lies beside it.
        device (`str` or `torch.device`, *optional*): move the model there; by default it stays where it is.
        trust_remote_code (`bool`, *optional*, defaults to `False`): run code that comes with the checkpoint.

    Returns:
        The model and the tokenizer.

    Raises:
        ValueError: without a model, or without a tokenizer for a model given as itself.

    Example:

    ```python
    >>> from ebt_transformers.assets import checkpoint_path
    >>> from ebt_transformers.pipelines.text_scores import load_text_model

    >>> model, tokenizer = load_text_model(checkpoint_path())
    >>> type(model).__name__, len(tokenizer)
    ('EBTForCausalLM', 1024)
    ```
    """
    if model is None:
        raise ValueError("There is no `model`: give a folder, a Hub id, or a model with its `tokenizer`.")
    given = isinstance(model, torch.nn.Module)  # a PeftModel is no PreTrainedModel
    if given and tokenizer is None:
        raise ValueError("A model given as itself needs its `tokenizer`; a folder or a Hub id brings its own.")
    source = model if tokenizer is None else tokenizer
    if not isinstance(source, PreTrainedTokenizerBase):
        source = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    if not given:
        model = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=trust_remote_code)
    return (model if device is None else model.to(device)), source


__all__ = ["TextLosses", "load_text_model", "text_energies", "text_losses"]
