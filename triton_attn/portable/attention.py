"""Dense and cross attention through torch's own fused call, where that is exact."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from triton_attn.portable._grouped import sdpa
from triton_attn.portable._rows import Piece, by_rows


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in O(Nq + Nk) memory. Dropout and lse are beyond torch's call and go by blocks of rows."""
    m, n = query.shape[2], key.shape[2]
    if key_padding_mask is not None:
        hidden = key_padding_mask[:, None, :, None]
        key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
        mask = _both(mask, ~key_padding_mask[:, None, None, :])
    if dropout_p > 0 or return_lse:
        shift = None if not causal else n - m if causal == "bottom_right" else 0
        columns = torch.arange(n, device=query.device)

        def visit(start: int, stop: int) -> list[Piece]:
            part = mask if mask is None or mask.shape[2] == 1 else mask[:, :, start:stop]
            seen, added = (part, None) if part is None or part.dtype == torch.bool else (part != -math.inf, part)
            if shift is not None:
                early = torch.ones(stop - start, n, dtype=torch.bool, device=query.device).tril(shift + start)
                seen = early if seen is None else seen & early
            return [Piece(key, value, columns, seen, added)]

        scale = query.shape[-1] ** -0.5 if scale is None else scale
        out, lse = by_rows(query, visit, n, scale=scale, dropout_p=dropout_p, seed=seed)
        return (out, lse) if return_lse else out
    from_top = bool(causal) and (causal != "bottom_right" or m == n)
    if causal and (mask is not None or not from_top):
        early = torch.ones(m, n, dtype=torch.bool, device=query.device).tril(0 if from_top else n - m)
        mask, from_top = _both(mask, early[None, None]), False
    return sdpa(query, key, value, mask, is_causal=from_top, scale=scale)


def _both(mask: Tensor | None, seen: Tensor) -> Tensor:
    if mask is None:
        return seen
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -math.inf)
