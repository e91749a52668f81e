"""Pooling of tokens by its definition, in naive PyTorch: a matrix that says which token lies in which cell."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def pool_tokens(
    x: Tensor,
    *,
    rows: int = 1,
    count: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    return_count: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """out_c = sum_{t in c} w_t x_t / sum_{t in c} w_t, 0 in a cell that is empty; w_t is the count of a token, 0 where it is hidden."""
    weight = _weights(x, count, key_padding_mask)
    member = _members(x, rows)
    total = weight @ member
    absent = (weight == 0)[:, None, :, None]
    summed = torch.einsum("bhnd,bn,nc->bhcd", x.masked_fill(absent, 0.0).to(weight.dtype), weight, member)
    out = (summed / total.masked_fill(total == 0, 1.0)[:, None, :, None]).to(x.dtype)
    return (out, total) if return_count else out


def bound(
    x: Tensor,
    grad_out: Tensor,
    grad_pooled_count: Tensor | None = None,
    *,
    rows: int = 1,
    count: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """S of the componentwise bound |error| <= K u S: sums of at most four products, a quotient, a rounding."""
    weight, member = _weights(x, count, key_padding_mask), _members(x, rows)
    total = weight @ member
    means: Any = pool_tokens(x.abs(), rows=rows, count=count, key_padding_mask=key_padding_mask)
    share = weight / (total.masked_fill(total == 0, 1.0) @ member.mT)
    return {
        "out": 2 * means,
        "pooled_count": total,
        "x": 2 * share[:, None, :, None] * torch.einsum("bhcd,nc->bhnd", grad_out.abs(), member),
    }


def _weights(x: Tensor, count: Tensor | None, key_padding_mask: Tensor | None) -> Tensor:
    """(B, N), in float32 at least."""
    ones = torch.ones(x.shape[0], x.shape[2], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    weight = ones if count is None else count.detach().to(ones.dtype)
    return weight if key_padding_mask is None else weight.masked_fill(key_padding_mask, 0.0)


def _members(x: Tensor, rows: int) -> Tensor:
    """(N, C): one where the token lies in the cell."""
    columns, height = x.shape[2] // rows, min(rows, 2)
    place, wide = torch.arange(x.shape[2], device=x.device), (columns + 1) // 2
    cell = place // max(columns, 1) // height * wide + place % max(columns, 1) // 2
    cells = torch.arange((rows + height - 1) // height * wide, device=x.device)
    return (cell[:, None] == cells[None, :]).to(torch.promote_types(x.dtype, torch.float32))
