"""Losses and energies of whole texts, of any length and in batches, by number of thinking steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..configuration.thinking_ebt import ThinkingConfig
from .perplexity import checked_steps, losses_by_steps
from .text_windows import EncodedText, batched, encode_texts, evaluating, tensors


@dataclass(frozen=True)
class TextLosses:
    """
    What [`text_losses`] found.

    Args:
        losses (`dict[int, list[float]]`): by number of thinking steps (0: a model without, or the start of one that
            starts at a prediction), the sum of the losses of the tokens of every text, in nats.
        tokens (`list[int]`): how many tokens of every text were predicted.
    """

    losses: dict[int, list[float]]
    tokens: list[int]


def _token_losses(
    model: PreTrainedModel, batch: tuple[Tensor, Tensor, Tensor], counts: Sequence[int], thinking: ThinkingConfig
) -> list[Tensor]:
    """Losses (B, S) after each number of steps, 0 where there is no target."""
    inputs, mask, targets = batch
    given = {"input_ids": inputs, "attention_mask": mask, "use_cache": False}
    if not hasattr(model, "energy"):
        logits = model(**given).logits.float()
        return [F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)]
    return losses_by_steps(model, {**given, "shift_labels": targets, "loss_reduction": "none"}, counts, thinking)


def text_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    steps: Sequence[int] | None = None,
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
        steps (sequence of `int`, *optional*): numbers of thinking steps; ignored for models that do not think. By
            default 1, 2, 4 and 8, and first 0 for models that start at a prediction of their own
            (`candidate_init="proposal"`), the only ones to have it. With one candidate, and no budget, all come from a
            single descent.
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
    batches = batched(model, encode_texts(tokenizer, texts, add_start_token), batch_size, max_length)
    losses: dict[int, list[float]] = {count: [0.0] * len(texts) for count in counts}
    tokens = [0] * len(texts)
    with evaluating(model):
        for batch in batches:
            by_step = _token_losses(model, tensors(batch, model.device), counts, options)
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
    batches = batched(model, encode_texts(tokenizer, texts, add_start_token), batch_size, max_length)
    found: list[list[np.ndarray]] = [[] for _ in texts]
    with evaluating(model):
        for batch in batches:
            inputs, mask, targets = tensors(batch, model.device)
            output = model(
                input_ids=inputs, attention_mask=mask, use_cache=False, thinking=thinking, output_energies=True
            )
            for window, energies, target in zip(batch, output.energies, targets, strict=True):
                found[window.text].append(energies[target != -100].float().cpu().numpy())
    return [np.concatenate(parts) for parts in found]


@dataclass(frozen=True)
class TokenScores:
    """
    What [`token_scores`] found about the scored tokens of one text; of all three numbers a lower one fits better.

    Args:
        ids (`list[int]`): the tokens.
        energies (`np.ndarray` of shape `(tokens,)`): of the tokens themselves, as one-hot candidates.
        relative_energies (`np.ndarray` of shape `(tokens,)`): those less the energy of what the model predicts in that
            place. Only differences within a position mean anything.
        losses (`np.ndarray` of shape `(tokens,)`): minus the log-probability under the prediction, in nats.
    """

    ids: list[int]
    energies: np.ndarray
    relative_energies: np.ndarray
    losses: np.ndarray


def _score_batch(
    model: PreTrainedModel, batch: tuple[Tensor, Tensor, Tensor], thinking: Any, landscape: int | None
) -> Tensor:
    """Energies, relative energies and losses (3, B, S) of the targets; anything where there is none."""
    inputs, mask, targets = batch
    tokens = targets.clamp(min=0)
    places = (targets != -100).any(0).nonzero().squeeze(1)  # thinking costs most: not about what is not asked for
    logits = model(inputs, attention_mask=mask, use_cache=False, thinking=thinking, logits_to_keep=places).logits
    log_probs = logits.log_softmax(-1)
    probs = logits.new_zeros(*inputs.shape, logits.shape[-1])
    probs[:, places] = log_probs.exp()
    losses = probs.new_zeros(inputs.shape)
    losses[:, places] = -log_probs.gather(-1, tokens[:, places, None]).squeeze(-1)
    energies, predicted = (
        model.energy(inputs, attention_mask=mask, landscape=landscape, **candidate)
        for candidate in ({"candidate_ids": tokens}, {"candidate_probs": probs})
    )
    return torch.stack([energies, energies - predicted, losses])


def check_scorer(model: PreTrainedModel) -> None:
    """Raises a `TypeError` for a model that gives tokens no energies."""
    # by what it has, not by its class: code from the Hub, and adapters, bring classes of their own
    if not hasattr(model, "energy") or not hasattr(model.config, "vocab_size"):
        raise TypeError(
            f"{type(model).__name__} gives tokens no energies: give an energy-based model of text (EBTForCausalLM)."
        )


def token_scores(
    model: PreTrainedModel,
    texts: Sequence[EncodedText],
    batch_size: int = 8,
    max_length: int | None = None,
    landscape: int | None = None,
    thinking: ThinkingConfig | Mapping[str, Any] | None = None,
) -> list[TokenScores]:
    """
    Energies and losses of given tokens.

    Args:
        model ([`EBTForCausalLM`]): the model.
        texts (sequence of `EncodedText`): as `encode_texts` and `encode_continuations` make them.
        batch_size, max_length: as for [`text_losses`].
        landscape (`int`, *optional*): which landscape gives the energies; the last by default.
        thinking ([`ThinkingConfig`] or `dict`, *optional*): how to think up the predictions.

    Returns:
        `list[TokenScores]`: for every text its scored tokens, in order.

    Raises:
        TypeError: for a model without energies.
        ValueError: for options out of range.

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> from ebt_transformers.assets import checkpoint_path
    >>> from ebt_transformers.pipelines.text_scores import token_scores
    >>> from ebt_transformers.pipelines.text_windows import encode_continuations

    >>> model = AutoModelForCausalLM.from_pretrained(checkpoint_path())
    >>> tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
    >>> texts = encode_continuations(tokenizer, "To be, or", [" not to be", " xyz"])
    >>> [scores.losses.shape for scores in token_scores(model, texts, thinking={"steps": 2})]
    [(3,), (4,)]
    ```
    """
    check_scorer(model)
    found: list[list[np.ndarray]] = [[] for _ in texts]
    with evaluating(model):
        for batch in batched(model, texts, batch_size, max_length):
            given = tensors(batch, model.device)
            scores = _score_batch(model, given, thinking, landscape)
            for row, window in enumerate(batch):
                found[window.text].append(scores[:, row, given[2][row] != -100].float().cpu().numpy())
    joined = [np.concatenate(parts, axis=1) for parts in found]
    return [TokenScores(text.ids[text.first :], *rows) for text, rows in zip(texts, joined, strict=True)]


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


__all__ = [
    "TextLosses",
    "TokenScores",
    "check_scorer",
    "load_text_model",
    "text_energies",
    "text_losses",
    "token_scores",
]
