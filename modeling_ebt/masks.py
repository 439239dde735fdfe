"""Who may look at whom in the context: causality, padding and the step token."""

import torch
from torch import Tensor


def packed_texts(position_ids: Tensor) -> Tensor | None:
    """
    Which text of a packed row every token belongs to: a text begins where positions do not go on.

    Args:
        position_ids (`torch.LongTensor` of shape `(B or 1, S)`): positions, counted from 0 in every text.

    Returns:
        `torch.LongTensor` of shape `(B or 1, S)`, the texts of a row numbered from 0; None if all are of one text.
    """
    begins = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not torch.compiler.is_compiling() and not bool(begins.any()):
        return None
    return torch.nn.functional.pad(begins.cumsum(-1), (1, 0))


def longest_text(texts: Tensor) -> int:
    """Tokens of the longest of the texts that [`packed_texts`] found."""
    if torch.compiler.is_compiling():  # checks look at no values then
        return 1
    rows = torch.arange(texts.shape[0], device=texts.device)[:, None] * texts.shape[1]
    return int((texts + rows).unique(return_counts=True)[1].max())


def visible_columns(
    attention_mask: Tensor | None,
    query_length: int,
    key_length: int,
    past_length: int,
    device: torch.device,
    texts: Tensor | None = None,
) -> Tensor:
    """
    Which context tokens each new position sees.

    Args:
        attention_mask (`Tensor`, *optional*): `(B, past + new)` with 1 for tokens and 0 for padding, or a ready
            `(B, 1, S, C)` mask, boolean or additive.
        query_length, key_length, past_length (`int`): new tokens [S], key columns [C], cached tokens.
        device (`torch.device`): where to build it.
        texts (`Tensor` of shape `(B or 1, S)`, *optional*): several texts in a row, see [`packed_texts`]; a token sees
            its own text only. Needs an empty past.

    Returns:
        Boolean `(B or 1, 1, S, C)`, True where visible.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        mask = attention_mask[..., :key_length]
        return mask if mask.dtype == torch.bool else mask >= 0
    columns = torch.arange(key_length, device=device)
    rows = torch.arange(query_length, device=device) + past_length
    visible = (columns[None, :] <= rows[:, None])[None, None]
    if texts is not None:
        visible = visible & (texts[:, None, :, None] == texts[:, None, None, :])
    if attention_mask is None:
        return visible
    tokens = attention_mask.to(device=device, dtype=torch.bool)
    if tokens.shape[1] < key_length:  # a static cache has room for tokens still to come; causality hides it
        tokens = torch.nn.functional.pad(tokens, (0, key_length - tokens.shape[1]), value=True)
    return visible & tokens[:, None, None, :key_length]


def with_own_column(visible: Tensor, past_length: int) -> Tensor:
    """Lets every context token see itself, so that padding rows have something to attend to. Nobody reads them."""
    rows, columns = visible.shape[-2:]
    own = torch.arange(columns, device=visible.device)[None, :] == (
        torch.arange(rows, device=visible.device)[:, None] + past_length
    )
    return visible | own


def with_step_column(visible: Tensor) -> Tensor:
    """Puts a column in front for the step token, which everybody sees."""
    return torch.nn.functional.pad(visible, (1, 0), value=True)


def with_step_row(visible: Tensor) -> Tensor:
    """Puts a row in front for the step token, which sees only itself (column 0)."""
    row = torch.zeros_like(visible[..., :1, :])
    row[..., 0] = True
    return torch.cat([row, visible], dim=-2)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as the additive one eager attention takes."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)


def positions_from_mask(
    attention_mask: Tensor | None, query_length: int, past_length: int, device: torch.device
) -> Tensor:
    """Position of every new token, counting tokens and not padding: `(B or 1, S)`."""
    if attention_mask is None or attention_mask.dim() == 4:
        return (torch.arange(query_length, device=device) + past_length)[None]
    counted = attention_mask.long().cumsum(-1) - 1
    return counted.clamp(min=0)[:, past_length : past_length + query_length]


__all__ = [
    "additive",
    "longest_text",
    "packed_texts",
    "positions_from_mask",
    "visible_columns",
    "with_own_column",
    "with_step_column",
    "with_step_row",
]
