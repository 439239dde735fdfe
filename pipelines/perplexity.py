"""How much thinking pays on held-out text: loss and perplexity for several numbers of thinking steps."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from ..configuration.thinking_ebt import ThinkingConfig
from ..modeling_ebt.losses import perplexity


DEFAULT_STEPS = (1, 2, 4, 8)


def _rows(token_blocks: Tensor | Iterable[Any]) -> list[Tensor]:
    rows = []
    for block in token_blocks:
        ids = block["input_ids"] if isinstance(block, Mapping) else block
        row = ids if isinstance(ids, Tensor) else torch.tensor(ids)
        if isinstance(block, Mapping) and block.get("labels") is not None:
            row = row[: int((torch.as_tensor(block["labels"]) != -100).sum())]  # padding at the end of the last block
        if row.dim() != 1 or row.numel() < 2:
            raise ValueError(f"A block must hold at least 2 tokens, got shape {tuple(row.shape)}.")
        rows.append(row.long())
    return rows


def _batches(rows: Sequence[Tensor], batch_size: int) -> list[Tensor]:
    """Rows of one length together, in order; no padding is needed."""
    batches: list[list[Tensor]] = []
    for row in rows:
        if batches and len(batches[-1]) < batch_size and batches[-1][0].shape == row.shape:
            batches[-1].append(row)
        else:
            batches.append([row])
    return [torch.stack(batch) for batch in batches]


def _batch_losses(model: PreTrainedModel, ids: Tensor, steps: Sequence[int], thinking: ThinkingConfig) -> list[float]:
    """Mean loss of one batch after each number of steps."""
    given = {"input_ids": ids, "labels": ids, "use_cache": False}
    if not hasattr(model, "energy"):
        return [model(**given).loss.item()]
    return [loss.item() for loss in losses_by_steps(model, given, steps, thinking)]


def losses_by_steps(
    model: PreTrainedModel, given: Mapping[str, Any], steps: Sequence[int], thinking: ThinkingConfig
) -> list[Tensor]:
    """
    Losses after each number of steps, from as few descents as can be.

    Args:
        model ([`EBTForCausalLM`]): in evaluation mode.
        given (`dict`): what else its forward gets, labels included.
        steps (sequence of `int`): numbers of thinking steps, as [`checked_steps`] gives them.
        thinking ([`ThinkingConfig`]): the other options.
    """
    if not descends_once(model, thinking):
        return [model(**given, thinking=thinking, thinking_steps=count).loss for count in steps]
    output = model(**given, thinking=thinking, thinking_steps=max(steps))
    # of 0 steps they are those of the start, which is the proposal
    return [output.step_losses[count - 1] if count else output.proposal_loss for count in steps]


def fewest_steps(model: PreTrainedModel) -> int:
    """The least a model can think about a prediction: not at all (0), if it starts at a prediction of its own."""
    # code that travels with older weights does not know this property
    return 0 if getattr(model.config, "starts_at_prediction", False) else 1


def default_steps(model: PreTrainedModel) -> list[int]:
    """The numbers of steps that are compared where nobody says which."""
    return [0, *DEFAULT_STEPS] if fewest_steps(model) == 0 else list(DEFAULT_STEPS)


def checked_steps(
    model: PreTrainedModel, steps: Sequence[int] | None, thinking: ThinkingConfig | Mapping[str, Any] | None
) -> tuple[list[int], ThinkingConfig]:
    """The numbers of steps to measure, ascending, `[0]` for a model without; and the other options of thinking."""
    options = ThinkingConfig.from_value(thinking)
    if options.steps is not None or options.landscapes is not None:
        raise ValueError("The numbers of steps are given as `steps`; leave them out of `thinking`.")
    if not hasattr(model, "energy"):
        return [0], options
    if steps is None:
        steps = default_steps(model)
    fewest = fewest_steps(model)
    if not steps or any(not isinstance(count, int) or count < fewest for count in steps):
        raise ValueError(f"`steps` must be integers of at least {fewest}, got {list(steps)}.")
    return sorted(set(steps)), options


def descends_once(model: PreTrainedModel, thinking: ThinkingConfig) -> bool:
    """
    Whether the first k steps of a long descent are the descent of k steps: with one candidate, without a budget that
    longer thoughts would use up earlier, and, for 0 steps, from the proposal itself.
    """
    moved = thinking.init == "normal" and fewest_steps(model) == 0
    alone = (thinking.candidates or 1) == 1 and model.config.default_thinking().candidates == 1
    return alone and not thinking.budget and not moved


@torch.no_grad()
def mean_losses_by_steps(
    model: PreTrainedModel,
    token_blocks: Tensor | Iterable[Any],
    steps: Sequence[int] | None = None,
    batch_size: int = 8,
    progress_bar: bool = True,
    thinking: ThinkingConfig | Mapping[str, Any] | None = None,
) -> dict[int, float]:
    """
    Mean cross-entropy per predicted token after each number of thinking steps; arguments and errors as
    [`perplexity_by_steps`].
    """
    counts, options = checked_steps(model, steps, thinking)
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    batches = _batches(_rows(token_blocks), batch_size)
    if not batches:
        raise ValueError("There are no blocks to evaluate on.")
    training = model.training
    model.eval()
    totals, tokens = [0.0] * len(counts), 0
    try:
        for batch in tqdm(batches, desc="Held-out text", unit="batch", disable=not progress_bar):
            predicted = batch.shape[0] * (batch.shape[1] - 1)
            losses = _batch_losses(model, batch.to(model.device), counts, options)
            totals = [total + loss * predicted for total, loss in zip(totals, losses, strict=True)]
            tokens += predicted
    finally:
        model.train(training)
    return {count: total / tokens for count, total in zip(counts, totals, strict=True)}


def perplexity_by_steps(
    model: PreTrainedModel,
    token_blocks: Tensor | Iterable[Any],
    steps: Sequence[int] | None = None,
    batch_size: int = 8,
    progress_bar: bool = True,
    thinking: ThinkingConfig | Mapping[str, Any] | None = None,
) -> dict[int, float]:
    """
    Perplexity of a language model on held-out tokens for several numbers of thinking steps: exp of the mean
    cross-entropy over all predicted tokens.

    With one candidate, and no budget, all numbers come from a single descent of the largest one.

    Args:
        model: an [`EBTForCausalLM`], or any other causal language model, which has one perplexity.
        token_blocks (`Tensor` of shape `(blocks, S)`, or an iterable):
            Blocks of token ids, each scored on its own; also rows `{"input_ids": ...}` of a data set.
        steps (sequence of `int`, *optional*): numbers of thinking steps; ignored for models that do not think. By
            default 1, 2, 4 and 8, and first 0 for models that start at a prediction of their own
            (`candidate_init="proposal"`), the only ones to have it.
        batch_size (`int`, *optional*, defaults to 8): blocks at a time.
        progress_bar (`bool`, *optional*, defaults to `True`): show one.
        thinking ([`ThinkingConfig`] or `dict`, *optional*): further options, the same for all numbers of steps.

    Returns:
        `dict[int, float]`: perplexity per number of steps, ascending; `{0: perplexity}` for a model without steps.

    Raises:
        ValueError: for no blocks, blocks of fewer than 2 tokens, and bad numbers of steps.

    Example:

    ```python
    >>> import torch
    >>> from ebt_transformers import EBTConfig, EBTForCausalLM
    >>> from ebt_transformers.pipelines import perplexity_by_steps

    >>> model = EBTForCausalLM(EBTConfig.from_preset("4xs", vocab_size=32))
    >>> list(perplexity_by_steps(model, torch.randint(0, 32, (3, 16)), progress_bar=False))
    [1, 2, 4, 8]
    ```
    """
    losses = mean_losses_by_steps(model, token_blocks, steps, batch_size, progress_bar, thinking)
    return {count: perplexity(loss) for count, loss in losses.items()}


__all__ = ["default_steps", "fewest_steps", "mean_losses_by_steps", "perplexity_by_steps"]
