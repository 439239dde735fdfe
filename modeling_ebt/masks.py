"""Who may look at whom in the context: causality, padding and the step token."""

import torch
from torch import Tensor


def visible_columns(
    attention_mask: Tensor | None, query_length: int, key_length: int, past_length: int, device: torch.device
) -> Tensor:
    """
    Which context tokens each new position sees.

    Args:
        attention_mask (`Tensor`, *optional*): `(B, past + new)` with 1 for tokens and 0 for padding, or a ready
            `(B, 1, S, C)` mask, boolean or additive.
        query_length, key_length, past_length (`int`): new tokens [S], key columns [C], cached tokens.
        device (`torch.device`): where to build it.

    Returns:
        Boolean `(B or 1, 1, S, C)`, True where visible.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        mask = attention_mask[..., :key_length]
        return mask if mask.dtype == torch.bool else mask >= 0
    columns = torch.arange(key_length, device=device)
    rows = torch.arange(query_length, device=device) + past_length
    visible = (columns[None, :] <= rows[:, None])[None, None]
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
    "positions_from_mask",
    "visible_columns",
    "with_own_column",
    "with_step_column",
    "with_step_row",
]
