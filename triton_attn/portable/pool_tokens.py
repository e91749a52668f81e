"""Pooling of tokens in stock operators: one weighted copy, summed over the axes of a cell."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pool_tokens(
    x: Tensor,
    *,
    rows: int = 1,
    count: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    return_count: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Means over cells of 2 x 2 tokens, of 1 x 2 in a single row."""
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = x.new_ones(x.shape[0], x.shape[2], dtype=wide) if count is None else count.detach().to(wide)
    if key_padding_mask is not None:
        weight = weight.masked_fill(key_padding_mask, 0.0)
    each, x_wide = weight[:, None, :, None], x.to(wide)
    if count is not None or key_padding_mask is not None:
        x_wide = x_wide.masked_fill(each == 0, 0.0)  # what is hidden may be NaN
    if count is not None:
        x_wide = x_wide * each
    total = _summed(each, rows)
    out = (_summed(x_wide, rows) / total.masked_fill(total == 0, 1.0)).to(x.dtype)
    return (out, total[:, 0, :, 0]) if return_count else out


def _summed(x: Tensor, rows: int) -> Tensor:
    """(B, H, N, .) over cells."""
    columns, height = x.shape[2] // rows, min(rows, 2)
    wide, tall = (columns + 1) // 2, (rows + height - 1) // height
    x = torch.unflatten(x, 2, (rows, columns))
    # compiled, at any length and never dense once cut, or odd lengths would need a graph of their own
    if torch.compiler.is_compiling() or columns % 2 or rows % height:
        x = F.pad(x, (0, 0, 0, 2, 0, height - 1))
    x = torch.unflatten(torch.unflatten(x[:, :, : tall * height, : wide * 2], 3, (wide, 2)), 2, (tall, height))
    return x.sum((3, 5)).flatten(2, 3)
