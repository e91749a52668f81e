"""Dilated attention by its definition, in naive PyTorch: one softmax that counts a key once for every branch that sees it."""

from __future__ import annotations

from collections.abc import Sequence

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
    key_padding_mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Branches mixed by their log-sum-exps are one softmax with scores s + log(number of branches)."""
    count = branches(query, segment_lengths, dilation_rates, mode, offset_rule, overlap)
    seen = (count > 0) & _softmax.visible(query.shape[2], query.shape[2], key_padding_mask, causal, query.device)
    key, value = _softmax.unpadded(key, value, key_padding_mask)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    added = count.clamp(min=1).to(query.dtype).log()
    out, lse = _softmax.attend(query, key, value, seen, added=added, scale=scale, dropout_p=dropout_p, seed=seed)
    return (out, lse) if return_lse else out


def branches(
    query: Tensor, segment_lengths: Sequence[int], dilation_rates: Sequence[int], mode: str, offset_rule: str, overlap: str
) -> Tensor:
    """In how many branches query i of head h sees key j: integers (1, H, N, N)."""
    heads, n = query.shape[1:3]
    place = torch.arange(n, device=query.device)
    count = torch.zeros(1, heads, n, n, dtype=torch.int64, device=query.device)
    for branch, (length, rate) in enumerate(zip(segment_lengths, dilation_rates, strict=True)):
        segment, phase = place // length, place % length % rate
        for head in range(heads):
            offset = offset_of(branch, head, heads, len(segment_lengths), rate, mode, offset_rule)
            if offset is not None:
                selected = phase == offset
                together = (segment[:, None] == segment) & selected[:, None] & selected
                count[0, head] += together
    return count.clamp(max=1) if overlap == "unique" else count


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
    key_padding_mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> dict[str, Tensor]:
    """S of the componentwise bound |error| <= K u S; see `_softmax.bound`."""
    count = branches(query, segment_lengths, dilation_rates, mode, offset_rule, overlap)
    seen = (count > 0) & _softmax.visible(query.shape[2], query.shape[2], key_padding_mask, causal, query.device)
    key, value = _softmax.unpadded(key, value, key_padding_mask)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    added = count.clamp(min=1).to(query.dtype).log()
    return _softmax.bound(query, key, value, seen, grad_out, grad_lse, added=added, scale=scale, dropout_p=dropout_p, seed=seed)
