"""Softmax attention a block of query rows at a time: what torch's fused call cannot return or reproduce (lse, our dropout)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from triton_attn.reference import _dropout

SCORES_AT_ONCE = 2**24


def by_rows(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, shift: int | None, scale: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(out, lse); `mask` is boolean or additive and 4-D, `shift` hides key n from query m where n > m + shift."""
    b, h, m, n = *query.shape[:3], key.shape[2]
    rows = max(1, SCORES_AT_ONCE // max(b * h * n, 1))
    again = torch.is_grad_enabled() and rows < m
    pieces = []
    for start in range(0, max(m, 1), rows):
        part = slice(start, min(start + rows, m))
        rule = mask if mask is None or mask.shape[2] == 1 else mask[:, :, part]
        block = (query[:, :, part], key, value, rule, shift, start, scale, dropout_p, seed)
        # recomputed in the backward pass, or every score would be kept for it
        pieces.append(checkpoint(_block, *block, use_reentrant=False) if again else _block(*block))
    outs, lses = zip(*pieces, strict=True)
    return (torch.cat(outs, 2), torch.cat(lses, 2)) if len(outs) > 1 else (outs[0], lses[0])


def _block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    shift: int | None,
    start: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    (b, h, m), (g, n) = query.shape[:3], key.shape[1:3]
    # heads that share a key stand below one another, so that one product serves them
    stacked = (b, g, h // max(g, 1) * m)
    folded = query.reshape(*stacked, query.shape[-1])
    scores = (folded @ key.mT).to(_wide(query)).view(b, h, m, n) * scale
    seen = None
    if mask is not None:
        seen = mask if mask.dtype == torch.bool else mask != -math.inf
        scores = scores if mask.dtype == torch.bool else scores + mask
    if shift is not None:
        early = torch.ones(m, n, dtype=torch.bool, device=query.device).tril(shift + start)
        seen = early if seen is None else seen & early
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    empty = lse == -math.inf
    weights = (scores - lse.masked_fill(empty, 0.0)).exp()
    if dropout_p > 0:
        assert seed is not None
        index = (torch.arange(b * h, device=query.device), torch.arange(start, start + m, device=query.device))
        kept = _dropout.keep(seed, dropout_p, *index, torch.arange(n, device=query.device)).view(b, h, m, n)
        weights = weights * kept * _dropout.rescale(dropout_p)
    out = weights.to(value.dtype).view(*stacked, n) @ value
    return out.view(b, h, m, value.shape[-1]), lse[..., 0]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
