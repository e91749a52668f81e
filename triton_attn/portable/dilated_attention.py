"""Dilated attention branch by branch on views, mixed by their log-sum-exps; on a CPU through torch's fused call, each way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby, product
from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_attn.portable import _fused
from triton_attn.portable._grouped import positive
from triton_attn.portable._rows import Piece, by_rows

Branch = tuple[int, int, list[tuple[int, slice]]]  # segment length, rate, and which heads select which phase


def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    mode: str = "longnet",
    offset_rule: str = "block",
    overlap: str = "count",
    detach_mixing: bool = False,
    key_padding_mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Dilated attention in O(N sum(w / r^2)). Dropout, overlap "unique" and a captured graph look at every pair: by blocks of rows, but
    in a graph all at once, in O(N^2) memory.
    """
    h, g = query.shape[1], key.shape[1]
    if key_padding_mask is not None:
        hidden = key_padding_mask[:, None, :, None]
        key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    branches = [
        (length, rate, _selecting(branch, h, len(segment_lengths), rate, mode, offset_rule))
        for branch, (length, rate) in enumerate(zip(segment_lengths, dilation_rates, strict=True))
    ]
    if dropout_p > 0 or overlap == "unique" or torch.compiler.is_compiling() or query.numel() == 0:
        once = overlap == "unique"
        together = [[branch] for branch in branches] if detach_mixing else [branches]
        parts = [_every_pair(query, key, value, some, once, key_padding_mask, bool(causal), scale, dropout_p, seed) for some in together]
        out, lse = _joined(parts, detach_mixing)
        return (out, lse) if return_lse else out
    if g != h:
        key, value = (x.repeat_interleave(h // max(g, 1), 1) for x in (key, value))
    # joined log-sum-exps err by their own magnitude, for which float64 has no wider type
    joinable = query.dtype != torch.float64 and _fused.serves(query, key, value)
    if key_padding_mask is None and not return_lse and joinable:
        query, scale = positive(query, scale)
        query, key, value = (_fused.together(x) for x in (query, key, value))
        return _Mixed.apply(query, key, value, branches, bool(causal), scale, detach_mixing)  # type: ignore[no-any-return,no-untyped-call]
    parts = [_branch(query, key, value, branch, key_padding_mask, bool(causal), scale) for branch in branches]
    out, lse = _joined(parts, detach_mixing)
    return (out, lse) if return_lse else out


def _joined(parts: Sequence[tuple[Tensor, Tensor]], detach_mixing: bool) -> tuple[Tensor, Tensor]:
    """(out, lse) of all from those of each."""
    if len(parts) == 1:
        return parts[0]
    outs, lses = zip(*parts, strict=True)
    each = torch.stack(lses)
    lse = each.logsumexp(0)
    share = (each - lse.masked_fill(lse == -math.inf, 0.0)).exp().to(outs[0].dtype)[..., None]
    share = share.detach() if detach_mixing else share
    return torch.stack([out * weight for out, weight in zip(outs, share, strict=True)]).sum(0), lse


def _selecting(branch: int, heads: int, number: int, rate: int, mode: str, offset_rule: str) -> list[tuple[int, slice]]:
    """(phase, heads that select it)."""
    if mode == "head_group":
        small, larger = heads // number, heads % number
        first = branch * small + min(branch, larger)
        return [(branch % rate, slice(first, first + small + (branch < larger)))]
    if offset_rule == "block":
        each = -(-heads // rate)
        return [(phase, slice(phase * each, min((phase + 1) * each, heads))) for phase in range(min(rate, heads)) if phase * each < heads]
    return [(phase, slice(phase, heads, rate)) for phase in range(min(rate, heads))]


def _branch(
    query: Tensor, key: Tensor, value: Tensor, branch: Branch, padding: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """(out, lse) of one branch, 0 and -inf where nothing is selected. Segments stand beside the heads; nothing is changed in place."""
    (b, h, n), e = query.shape[:3], value.shape[-1]
    length, rate, phases = branch
    length = min(length, max(n, 1))
    rate = min(rate, length)  # nothing is selected beyond the phase, either way
    segments = -(-n // length)
    short = segments * length - n
    hidden = torch.zeros(b, n, dtype=torch.bool, device=query.device) if padding is None else padding
    hidden = F.pad(hidden, (0, short), value=True).view(b, 1, segments, length)
    folded = [F.pad(x, (0, 0, 0, short)).view(b, h, segments, length, x.shape[-1]) for x in (query, key, value)]
    outs, lses = [], []
    order: list[int] = []
    for phase, heads in phases:
        chosen = range(h)[heads]
        if not chosen or phase >= length:
            continue
        rows = len(range(phase, length, rate))
        q, k, v = (x[:, heads, :, phase::rate].reshape(b, len(chosen) * segments, rows, x.shape[-1]) for x in folded)
        seen = ~hidden[..., phase::rate].expand(b, len(chosen), segments, rows).reshape(b, -1, 1, rows)

        def visit(start: int, stop: int, k: Tensor = k, v: Tensor = v, seen: Tensor = seen) -> list[Piece]:
            if not causal:
                return [Piece(k, v, seen.new_empty(0), seen)]
            early = torch.ones(stop - start, stop, dtype=torch.bool, device=k.device).tril_(start)
            return [Piece(k[:, :, :stop], v[:, :, :stop], seen.new_empty(0), seen[..., :stop] & early)]

        out, lse = by_rows(q, visit, rows, scale=scale, dropout_p=0.0, seed=None)
        # back among the rows of the other phases
        before, after = phase, length - phase - 1 - (rows - 1) * rate
        out = F.pad(out[..., None, :], (0, 0, 0, rate - 1)).flatten(2, 3)[:, :, : (rows - 1) * rate + 1]
        lse = F.pad(lse[..., None], (0, rate - 1), value=-math.inf).flatten(2, 3)[:, :, : (rows - 1) * rate + 1]
        out, lse = F.pad(out, (0, 0, before, after)), F.pad(lse, (before, after), value=-math.inf)
        outs.append(out.view(b, len(chosen), segments * length, e)[:, :, :n])
        lses.append(lse.view(b, len(chosen), segments * length)[:, :, :n])
        order += chosen
    left = [head for head in range(h) if head not in order]
    outs.append(value.new_zeros(b, len(left), n, e))
    lses.append(torch.full((b, len(left), n), -math.inf, dtype=torch.promote_types(query.dtype, torch.float32), device=query.device))
    places = torch.tensor([*order, *left], device=query.device).argsort()
    return torch.cat(outs, 1)[:, places], torch.cat(lses, 1)[:, places]


def _every_pair(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    branches: Sequence[Branch],
    once: bool,
    padding: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    h, n = query.shape[1:3]
    places = torch.arange(n, device=query.device)
    offsets = torch.full((len(branches), h, 1, 1), -1, device=query.device)
    for i, (_, _, phases) in enumerate(branches):
        for phase, heads in phases:
            offsets[i, heads] = phase

    def visit(start: int, stop: int) -> list[Piece]:
        rows = places[start:stop, None]
        count = torch.zeros(h, stop - start, n, dtype=torch.int64, device=query.device)
        for (length, rate, _), offset in zip(branches, offsets, strict=True):
            meet = rows // length == places // length
            count = count + (meet & (rows % length % rate == offset) & (places % length % rate == offset))
        seen = (count > 0)[None]
        if causal:
            seen = seen & (places <= rows)
        if padding is not None:
            seen = seen & ~padding[:, None, None]
        added = None if once else count.clamp(min=1).to(torch.promote_types(query.dtype, torch.float32)).log()
        return [Piece(key, value, places, seen, added)]

    return by_rows(query, visit, 4 * n, scale=scale, dropout_p=dropout_p, seed=seed)


class _Mixed(torch.autograd.Function):
    """Branches by torch's fused call, whose backward takes the joint output and log-sum-exp."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, branches: Sequence[Branch], causal: bool, scale: float, detach_mixing: bool
    ) -> Tensor:
        out = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
        # a log-sum-exp is rounded by the torch call that gives it; in float64 joining rounds it no further
        lse = torch.full(query.shape[:3], -math.inf, dtype=torch.float64, device=query.device)
        for first, (q, k, v, joint, total) in _pieces(branches, query, key, value, out, lse[..., None]):
            found, own = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=causal, scale=scale)
            own = own[..., None].double()
            if first:
                joint.copy_(found)
                total.copy_(own)
                continue
            both = torch.logaddexp(total, own)
            joint.lerp_(found, (own - both).exp_().to(joint.dtype))
            total.copy_(both)
        ctx.save_for_backward(query, key, value, out, lse.to(torch.promote_types(query.dtype, torch.float32)))
        ctx.how = branches, causal, scale, detach_mixing
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        query, key, value, out, lse = ctx.saved_tensors
        return *_Gradients.apply(_fused.together(grad), query, key, value, out, lse, *ctx.how), None, None, None, None  # type: ignore[no-untyped-call]


class _Gradients(_fused.Last):
    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        branches: Sequence[Branch],
        causal: bool,
        scale: float,
        detach_mixing: bool,
    ) -> tuple[Tensor, ...]:
        results = tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
        for first, (q, k, v, joint, total, do, *sums) in _pieces(branches, query, key, value, out, lse[..., None], grad, *results):
            if detach_mixing:  # delta is of the branch's own output
                joint, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=causal, scale=scale)
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                do, q, k, v, joint, total[..., 0], 0.0, causal, scale=scale
            )
            for gradient, part in zip(sums, found, strict=True):
                gradient.copy_(part) if first else gradient.add_(part)
        return results


def _pieces(branches: Sequence[Branch], *tensors: Tensor) -> Iterator[tuple[bool, list[Tensor]]]:
    """Views (., ., rows, D) of (B, H, N, D) tensors that meet in one call, and whether these are the first for their rows.

    Phases one after the other lie at one distance, head and row together, so they are an axis, as are their heads, whole segments and
    the batch. A call takes the two longest of these; the others are a loop.
    """
    n, h = tensors[0].shape[2], tensors[0].shape[1]
    for number, (length, rate, phases) in enumerate(branches):
        length = min(length, n)
        for start, segments, size in ((0, n // length, length), (n // length * length, 1, n % length)):
            shaped = [((len(range(phase, size, rate)), len(range(h)[heads])), phase, heads) for phase, heads in phases]
            for (rows, each), alike in groupby(shaped, itemgetter(0)):
                (_, phase, heads), *others = alike
                if rows == 0 or each == 0:
                    continue
                apart = others[0][2].start - heads.start if others else 0
                sizes = tensors[0].shape[0], 1 + len(others), each, segments
                outer, inner, *looped = sorted(range(4), key=sizes.__getitem__, reverse=True)
                for turn in product(*(range(sizes[axis]) for axis in looped)):
                    views = []
                    for x in tensors:
                        item, head, row, column = x.stride()
                        steps = item, apart * head + row, (heads.step or 1) * head, length * row
                        place = x.storage_offset() + heads.start * head + (start + phase) * row
                        place += sum(at * steps[axis] for at, axis in zip(turn, looped, strict=True))
                        shape = sizes[outer], sizes[inner], rows, x.shape[-1]
                        views.append(x.as_strided(shape, (steps[outer], steps[inner], rate * row, column), place))
                    yield number == 0, views
