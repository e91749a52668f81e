"""Softmax weights after the fact: what the fused call never held."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from triton_attn.arguments import autocast_dtype

SCORES_AT_ONCE = 2**22


def attention_weights(
    query: Tensor,
    key: Tensor,
    *,
    mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    average: bool = False,
) -> Tensor:
    """weights = softmax(D ** -0.5 query key^T + mask)

    Computed by tiles of queries, and again in the backward pass: no tensor of scores is larger than the average over the heads is
    (or 2 ** 22), so there is never a copy for each head. A tile has whole rows, so it needs no log-sum-exp from the fused call,
    whose gradient would be a second large part that cancels the first. A compiled graph, which serves every length, has one tile,
    and transforms of torch.func keep what the backward pass needs: they take no checkpoint.

    Args:
        query: (B, H, Nq, D).
        key: (B, H, Nk, D).
        mask: broadcastable to (B, H, Nq, Nk), 2 dimensions or more. Boolean: True = attend. Floating: added to the scores.
        key_padding_mask: (B, Nk) boolean, True = ignore.
        average: the mean over the heads.

    Returns:
        (B, H, Nq, Nk), or (B, Nq, Nk) if averaged, in float32 (float64 for float64), differentiable. A query that sees no key has
        weights of 0.
    """
    (b, h, m, d), n = query.shape, key.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    # entering autocast's context costs as much as a small product
    kind = query.device.type
    with torch.autocast(kind, enabled=False) if autocast_dtype(kind) is not None else nullcontext():
        query, key = query.to(wide) * d**-0.5, key.to(wide).mT
        if torch.compiler.is_compiling() or max(SCORES_AT_ONCE, b * m * n) >= b * h * m * n:
            return _tile(query, key, mask, key_padding_mask, average)
        rows = max(1, max(SCORES_AT_ONCE, b * m * n) // max(b * h * n, 1))
        pieces = []
        for start in range(0, max(m, 1), rows):
            part = slice(start, start + rows)
            rule = mask if mask is None or mask.shape[-2] == 1 else mask[..., part, :]
            tile = (query[:, :, part], key, rule, key_padding_mask, average)
            # recomputed in the backward pass, or every head's scores would be kept for it
            again = torch.is_grad_enabled() and rows < m and not torch._C._are_functorch_transforms_active()
            pieces.append(checkpoint(_tile, *tile, use_reentrant=False, preserve_rng_state=False) if again else _tile(*tile))
        return torch.cat(pieces, -2) if len(pieces) > 1 else pieces[0]


def _tile(query: Tensor, key: Tensor, mask: Tensor | None, padding: Tensor | None, average: bool) -> Tensor:
    scores = query @ key
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if padding is not None:
        scores = scores.masked_fill(padding[:, None, None, :], -math.inf)
    if mask is not None or padding is not None:
        # flat scores where no key is seen, so that no NaN arises there or in the gradient
        empty = (scores == -math.inf).all(-1, keepdim=True)
        weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    else:
        weights = scores.softmax(-1)
    return weights.mean(1) if average else weights
