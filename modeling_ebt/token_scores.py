"""
Log-probabilities of given tokens, for trainers that ask a model for those instead of logits.

TRL's trainers replace a model's `forward` by one that multiplies the hidden states of the transformer by the output
layer. An energy-based model has no such hidden states: its prediction is where the descent ends. With the mixin below
it keeps its own forward and answers the same question by thinking.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput


QUESTION = "fused_lm_head"  # the argument with which TRL asks for log-probabilities


@dataclass
class EBTTokenScores(ModelOutput):
    """
    What is asked about given tokens, ``T`` of them a row (`S - 1` of `labels`, `S` of `shift_labels`). Everything of
    shape `(B, T)` is 0 where the label is -100, and None if not asked for.

    Args:
        loss (`torch.FloatTensor` of shape `()`): minus the sum of `log_probs` over the number of labels.
        log_probs (`torch.FloatTensor` of shape `(B, T)`):
            Of every label; in training mode the mean over the thinking steps (recipe s1; recipe proposal adds the
            weighted one of the proposal), so that their sum is the recipe's objective, in evaluation mode that of the
            final prediction.
        entropy (`torch.FloatTensor` of shape `(B, T)`, *optional*): of the final prediction, in nats.
        log_sum_sq_probs (`torch.FloatTensor` of shape `(B, T)`, *optional*):
            Logarithm of the sum of its squared probabilities, without gradient.
        mean_logits (`torch.FloatTensor` of shape `(B, T)`, *optional*): mean of its logits, without gradient.
        is_top1 (`torch.BoolTensor` of shape `(B, T)`, *optional*): whether the label is the likeliest token.
        label_mask (`torch.BoolTensor` of shape `(B, T)`): whether there is a label.
        aux_loss: always None; only mixtures of experts have one.
    """

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None


def _entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def _log_sum_sq_probs(logits: Tensor, targets: Tensor) -> Tensor:
    return (2 * logits.detach().log_softmax(-1)).logsumexp(-1)


def _mean_logits(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.detach().mean(-1)


def _is_top1(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.argmax(-1) == targets


QUESTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "entropy": _entropy,
    "log_sum_sq_probs": _log_sum_sq_probs,
    "mean_logits": _mean_logits,
    "is_top1": _is_top1,
}


class EBTTokenScoresMixin:
    """A model that thinks although a trainer gives it a forward without thinking."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward" and QUESTION in inspect.signature(value, follow_wrapped=False).parameters:
            value = MethodType(_with_thinking(value.__func__), self)
        super().__setattr__(name, value)


def _with_thinking(replacement: Callable) -> Callable:
    """The forward that a trainer put in place of the model's, with an answer of our own where it would not think."""
    settings = inspect.getclosurevars(replacement).nonlocals
    temperature = settings.get("temperature", 1.0)
    asked = [name for name in QUESTIONS if name in settings.get("outputs", QUESTIONS)]
    if temperature != 1:
        raise ValueError(
            f"The trainer scores tokens at temperature {temperature:g}, but an energy-based model learns from every "
            "thinking step as it is. Set the trainer's `temperature` to 1.0."
        )

    @functools.wraps(replacement)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.pop(QUESTION, False):
            return replacement(self, *args, **kwargs)  # which is the model's own
        think = functools.partial(replacement, self, *args)
        return score_tokens(think, asked, **kwargs)

    return forward


def score_tokens(
    think: Callable[..., Any],
    asked: list[str],
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    **kwargs: Any,
) -> EBTTokenScores:
    """
    What a model thinks of given tokens.

    Args:
        think (`Callable`): the forward of an [`EBTForCausalLM`].
        asked (`list[str]`): names of `QUESTIONS` to answer besides the log-probabilities.
        labels (`torch.LongTensor` of shape `(B, S)`, *optional*): tokens, shifted inside, -100 ignored.
        shift_labels (`torch.LongTensor` of shape `(B, S)`, *optional*): already shifted, instead of `labels`.
        num_items_in_batch (`int` or `Tensor`, *optional*): what `loss` divides by; this batch's labels by default.
        kwargs: the other arguments of `think`.

    Returns:
        [`EBTTokenScores`].

    Raises:
        ValueError: without labels.

    Example:

    ```python
    >>> import torch
    >>> from ebt_transformers import EBTConfig, EBTForCausalLM
    >>> from ebt_transformers.modeling_ebt.token_scores import score_tokens

    >>> model = EBTForCausalLM(EBTConfig.from_preset("4xs", vocab_size=32)).eval()
    >>> ids = torch.tensor([[1, 2, 3, 4]])
    >>> scores = score_tokens(model, ["entropy"], labels=ids, input_ids=ids, thinking_steps=4)
    >>> scores.log_probs.shape, scores.entropy.shape
    (torch.Size([1, 3]), torch.Size([1, 3]))
    ```
    """
    if labels is None and shift_labels is None:
        raise ValueError("Scoring tokens needs `labels` (or `shift_labels`): the tokens to score.")
    output = think(labels=labels, shift_labels=shift_labels, loss_reduction="none", **kwargs)
    losses, logits, targets = output.loss, output.logits, shift_labels
    if targets is None:
        assert labels is not None  # or it would have been raised above
        losses, logits, targets = losses[:, :-1], logits[:, :-1], labels[:, 1:]
    targets = targets.to(logits.device)
    mask = targets != -100
    answers = {name: QUESTIONS[name](logits, targets) for name in asked}
    return EBTTokenScores(
        loss=losses.sum() / (mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch),
        log_probs=-losses,
        label_mask=mask,
        **{name: answer.masked_fill(~mask, 0) for name, answer in answers.items()},
    )


__all__ = ["EBTTokenScores", "EBTTokenScoresMixin", "score_tokens"]
