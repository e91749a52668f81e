"""Attention within packed sequences, one sequence after the other, each by torch's fused call where that is exact."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from triton_attn.portable._grouped import sdpa
from triton_attn.portable._rows import Piece, by_rows
from triton_attn.reference._packed import visible


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """In O(sum of Nq Nk over the sequences) time, in the window's where there is one; in O(Nq Nk) where offsets cannot be read."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    left, right = window_size[0], 0 if causal else window_size[1]
    if not _readable(cu_seqlens_q):
        seen = visible(query, key, cu_seqlens_q, cu_seqlens_k, causal, window_size)
        columns = torch.arange(k.shape[2], device=k.device)

        def everything(start: int, stop: int) -> list[Piece]:
            return [Piece(k, v, columns, seen[start:stop])]

        out, lse = by_rows(q, everything, k.shape[2], scale=scale, dropout_p=dropout_p, seed=seed)
        out, lse = out[0].transpose(0, 1), lse[0]
        return (out, lse) if return_lse else out
    fused = dropout_p == 0 and not return_lse
    outs, lses, reached = [], [], 0
    for (a, b), (c, d) in zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True):
        rows, shift, reached = q[:, :, a:b], (d - c) - (b - a), b
        if b == a:
            continue
        if c == d:
            outs.append(_nothing(rows, v))
            lses.append(rows.new_full(rows.shape[:3], -torch.inf, dtype=torch.promote_types(query.dtype, torch.float32)))
        elif fused and left < 0 and (right < 0 or (right == 0 and shift == 0)):
            keys, values = k[:, :, c:d], v[:, :, c:d]
            outs.append(sdpa(rows, keys, values, None, is_causal=right == 0, scale=scale))
        else:
            out, lse = _windowed(rows, k, v, (a, c, d, shift), left, right, scale, dropout_p, seed)
            outs.append(out)
            lses.append(lse)
    if reached < q.shape[2] or not outs:
        rest = q[:, :, reached:]
        outs.append(_nothing(rest, v))
        lses.append(rest.new_full(rest.shape[:3], -torch.inf, dtype=torch.promote_types(query.dtype, torch.float32)))
    out = torch.cat(outs, 2)[0].transpose(0, 1)
    return (out, torch.cat(lses, 2)[0]) if return_lse else out


def _readable(offsets: Tensor) -> bool:
    """Whether this is a real tensor that nothing traces or maps."""
    if type(offsets) is not Tensor or offsets.is_meta or torch.compiler.is_compiling():
        return False
    return not torch._C._are_functorch_transforms_active()


def _nothing(rows: Tensor, value: Tensor) -> Tensor:
    """What queries without keys give."""
    return rows.new_zeros((*rows.shape[:3], value.shape[-1]))


def _windowed(
    rows: Tensor,
    key: Tensor,
    value: Tensor,
    place: tuple[int, int, int, int],
    left: int,
    right: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One sequence by blocks of its queries, each over the keys that its window reaches."""
    a, c, d, shift = place
    columns = torch.arange(c, d, device=key.device)

    def visit(start: int, stop: int) -> list[Piece]:
        # positions of queries count through all sequences, for dropout; here from the sequence's first key
        first, last = start - a + shift, stop - a + shift
        begin = 0 if left < 0 else min(max(first - left, 0), d - c)
        end = d - c if right < 0 else max(min(last + right, d - c), begin)
        part = slice(c + begin, c + end)
        ahead = torch.arange(begin, end, device=key.device) - torch.arange(first, last, device=key.device)[:, None]
        seen = torch.ones_like(ahead, dtype=torch.bool)
        seen = seen if left < 0 else seen & (ahead >= -left)
        seen = seen if right < 0 else seen & (ahead <= right)
        return [Piece(key[:, :, part], value[:, :, part], columns[begin:end], seen)]

    most = None if left < 0 or right < 0 else max(64, left + right + 1)
    reach = d - c if most is None else min(d - c, 2 * most)
    return by_rows(rows, visit, reach, first=a, most=most, scale=scale, dropout_p=dropout_p, seed=seed)
