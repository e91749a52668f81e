"""Attention to a subset of the keys on their copies, and on each query's own key, by blocks of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from triton_attn.portable import _fused
from triton_attn.portable._grouped import sdpa
from triton_attn.portable._rows import Piece, by_rows


def subset_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    indices: Tensor,
    include_self: bool = True,
    key_padding_mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Subset attention in O(Nq K) time and O(Nq + K) memory."""
    (h, m), (g, n) = query.shape[1:3], key.shape[1:3]
    if key_padding_mask is not None:
        hidden = key_padding_mask[:, None, :, None]
        key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
    shown = None if key_padding_mask is None else ~key_padding_mask[:, None]
    named = indices.where((indices >= 0) & (indices < n), n).long().sort(-1).values
    here = (named < n) & torch.cat((torch.ones_like(named[..., :1], dtype=torch.bool), named[..., 1:] != named[..., :-1]), -1)
    chosen = torch.zeros(*named.shape[:2], n + 1, dtype=torch.bool, device=named.device).scatter(2, named, True)[..., :n]
    columns = named.clamp(max=max(n - 1, 0))
    if shown is not None:
        here = here & shown.expand(-1, g, -1).gather(2, columns) if n else here
    keys, values = (x.gather(2, columns[..., None].expand(*columns.shape, x.shape[3])) for x in (key, value))
    every = here.repeat_interleave(h // max(g, 1), 1)[:, :, None]
    if not (include_self or causal or dropout_p > 0 or return_lse):
        return sdpa(query, keys, values, every, scale=scale)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if not (causal or dropout_p > 0 or return_lse or shown is not None) and _fused.serves(query, keys, value) and bool(here.any(-1).all()):
        return _fused.with_own_key(query, keys, values, key, value, ~chosen, scale, None if here.all() else ~every)
    shift = n - m if causal == "bottom_right" else 0
    spread = columns.repeat_interleave(h // max(g, 1), 1)[:, :, None]
    own = ~chosen if shown is None else ~chosen & shown
    own = own.repeat_interleave(h // max(g, 1), 1)[:, :, None]

    def visit(start: int, stop: int) -> list[Piece]:
        rule = every
        if causal:
            rule = every & (spread <= torch.arange(start + shift, stop + shift, device=query.device)[:, None])
        pieces = [Piece(keys, values, columns, rule)]
        if include_self:
            diagonal = torch.eye(stop - start, dtype=torch.bool, device=query.device) & own[..., start:stop]
            places = torch.arange(start, stop, device=query.device)
            pieces.append(Piece(key[:, :, start:stop], value[:, :, start:stop], places, diagonal))
        return pieces

    most = max(columns.shape[2], 64) if include_self else None
    out, lse = by_rows(query, visit, columns.shape[2] + 1, most=most, scale=scale, dropout_p=dropout_p, seed=seed)
    return (out, lse) if return_lse else out
