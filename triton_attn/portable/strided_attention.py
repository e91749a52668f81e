"""Strided attention on a view of the keys: torch's own fused call where that is exact, else by blocks of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from triton_attn.portable import _fused
from triton_attn.portable._grouped import sdpa
from triton_attn.portable._rows import Piece, by_rows


def strided_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    stride: int,
    phase: int = 0,
    include_self: bool = False,
    key_padding_mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Strided attention in O(Nq Nk / stride) time and O(Nq + Nk) memory."""
    (h, m), (g, n) = query.shape[1:3], key.shape[1:3]
    if key_padding_mask is not None:
        hidden = key_padding_mask[:, None, :, None]
        key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
    taken = slice(phase, None, stride)
    seen = None if key_padding_mask is None else ~key_padding_mask[:, None, None, :]
    gridded = None if seen is None else seen[..., taken]
    if not (include_self or causal or dropout_p > 0 or return_lse):
        keys, values = key[:, :, taken], value[:, :, taken]
        return sdpa(query, keys, values, gridded, scale=scale)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    plain = key_padding_mask is None and dropout_p == 0 and not return_lse and not torch.compiler.is_compiling()
    columns = torch.arange(n, device=query.device)
    if plain and include_self and not causal and _fused.serves(query, key[:, :, taken], value):
        own = columns % stride != phase
        return _fused.with_own_key(query, key[:, :, taken], value[:, :, taken], key, value, own, scale)
    if plain and causal and not include_self and phase == 0 and m == n and m % stride == 0 and g == h:
        return _causal(query, key, value, stride, scale)
    off_grid = columns % stride != phase
    shift = n - m if causal == "bottom_right" else 0

    def visit(start: int, stop: int) -> list[Piece]:
        part, rule = taken, gridded
        if causal:
            part = slice(phase, max(stop + shift, phase), stride)
            early = columns[part] <= torch.arange(start + shift, stop + shift, device=query.device)[:, None]
            rule = early if seen is None else seen[..., part] & early
        pieces = [Piece(key[:, :, part], value[:, :, part], columns[part], rule)]
        if include_self:
            own = torch.eye(stop - start, dtype=torch.bool, device=query.device) & off_grid[start:stop]
            rule = own if seen is None else seen[..., start:stop] & own
            pieces.append(Piece(key[:, :, start:stop], value[:, :, start:stop], columns[start:stop], rule))
        return pieces

    out, lse = by_rows(query, visit, n // stride + 1, scale=scale, dropout_p=dropout_p, seed=seed)
    return (out, lse) if return_lse else out


def _causal(query: Tensor, key: Tensor, value: Tensor, stride: int, scale: float) -> Tensor:
    """Queries i = a stride + r see keys 0, stride, ..., a stride: for each r an ordinary causal call on the same keys."""
    b, h, n = query.shape[:3]
    rows = query.reshape(b * h, n // stride, stride, query.shape[-1]).transpose(1, 2)
    keys, values = (x[:, :, ::stride].flatten(0, 1)[:, None].expand(-1, stride, -1, -1) for x in (key, value))
    out = sdpa(rows, keys, values, None, is_causal=True, scale=scale)
    return out.transpose(1, 2).reshape(b, h, n, value.shape[-1])
