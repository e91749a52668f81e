"""Dilated attention by its definition, in naive PyTorch: one softmax that counts a key once for every branch that sees it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from triton_attn.reference import _softmax


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
    """Branches mixed by their log-sum-exps are one softmax with scores s + log(number of branches)."""
    meet = branches(query, segment_lengths, dilation_rates, mode, offset_rule)
    visible = _softmax.visible(query.shape[2], query.shape[2], key_padding_mask, causal, query.device)
    key, value = _softmax.unpadded(key, value, key_padding_mask)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    same: dict[str, Any] = {"scale": scale, "dropout_p": dropout_p, "seed": seed}
    if detach_mixing:
        outs, lses = zip(*(_softmax.attend(query, key, value, visible & branch, **same) for branch in meet), strict=True)
        lse = torch.stack(lses).logsumexp(0)
        out = sum(weight[..., None] * out for weight, out in zip(mixing(lses, lse), outs, strict=True)).to(query.dtype)
    else:
        count = meet.sum(0, keepdim=True)
        added = None if overlap == "unique" else count.clamp(min=1).to(query.dtype).log()
        out, lse = _softmax.attend(query, key, value, visible & (count > 0), added=added, **same)
    return (out, lse) if return_lse else out


def mixing(lses: Sequence[Tensor], lse: Tensor) -> Tensor:
    """Each branch's weight in the mixture, a constant."""
    return (torch.stack(tuple(lses)) - lse.masked_fill(lse == -math.inf, 0.0)).exp().detach()


def branches(query: Tensor, segment_lengths: Sequence[int], dilation_rates: Sequence[int], mode: str, offset_rule: str) -> Tensor:
    """Whether query i of head h sees key j in a branch: (branches, H, N, N)."""
    heads, n = query.shape[1:3]
    place = torch.arange(n, device=query.device)
    meet = torch.zeros(len(segment_lengths), heads, n, n, dtype=torch.bool, device=query.device)
    for branch, (length, rate) in enumerate(zip(segment_lengths, dilation_rates, strict=True)):
        segment, phase = place // length, place % length % rate
        for head in range(heads):
            offset = offset_of(branch, head, heads, len(segment_lengths), rate, mode, offset_rule)
            if offset is not None:
                selected = phase == offset
                meet[branch, head] = (segment[:, None] == segment) & selected[:, None] & selected
    return meet


def offset_of(branch: int, head: int, heads: int, number: int, rate: int, mode: str, offset_rule: str) -> int | None:
    """Which phase of a branch a head selects; None if the branch is not the head's."""
    if mode == "longnet":
        return head // -(-heads // rate) if offset_rule == "block" else head % rate
    # heads in contiguous groups, the first ones larger by one: a branch for each group
    small, larger = heads // number, heads % number
    first = branch * small + min(branch, larger)
    return branch % rate if first <= head < first + small + (branch < larger) else None


def bound(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None = None,
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
    seed: Tensor | None = None,
) -> dict[str, Tensor]:
    """S of the componentwise bound |error| <= K u S; see `_softmax.bound`.

    `detach_mixing`: for queries and keys the sum of each branch alone, which takes its share of the gradients.
    """
    meet = branches(query, segment_lengths, dilation_rates, mode, offset_rule)
    visible = _softmax.visible(query.shape[2], query.shape[2], key_padding_mask, causal, query.device)
    key, value = _softmax.unpadded(key, value, key_padding_mask)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    same: dict[str, Any] = {"scale": scale, "dropout_p": dropout_p, "seed": seed}
    count = meet.sum(0, keepdim=True)
    added = None if overlap == "unique" else count.clamp(min=1).to(query.dtype).log()
    sizes = _softmax.bound(query, key, value, visible & (count > 0), grad_out, grad_lse, added=added, **same)
    if detach_mixing:
        _, lse = _softmax.attend(query, key, value, visible & (count > 0), added=added, **same)
        sizes["query"], sizes["key"] = torch.zeros_like(query), torch.zeros_like(key)
        for branch in meet:
            _, own = _softmax.attend(query, key, value, visible & branch, **same)
            weight = mixing((own,), lse)[0]
            grads = weight[..., None] * grad_out, None if grad_lse is None else weight * grad_lse
            alone = _softmax.bound(query, key, value, visible & branch, *grads, **same)
            for name in ("query", "key"):
                sizes[name] += alone[name]
    return sizes
