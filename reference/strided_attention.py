"""Strided attention by its definition, in naive PyTorch: every query sees each stride-th key, and itself if asked."""

from __future__ import annotations

import torch
from torch import Tensor

from triton_attn.reference import _softmax


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
    """Softmax attention over keys phase, phase + stride, ...; with include_self query i also sees key i, once."""
    seen = visible(query, key, stride, phase, include_self, key_padding_mask, causal)
    key, value = _softmax.unpadded(key, value, key_padding_mask)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out, lse = _softmax.attend(query, key, value, seen, scale=scale, dropout_p=dropout_p, seed=seed)
    return (out, lse) if return_lse else out


def visible(
    query: Tensor, key: Tensor, stride: int, phase: int, include_self: bool, key_padding_mask: Tensor | None, causal: bool | str
) -> Tensor:
    """Boolean, broadcastable to (B, H, Nq, Nk): which key each query sees."""
    m, n = query.shape[2], key.shape[2]
    columns = torch.arange(n, device=query.device)
    rule = ((columns >= phase) & (columns % stride == phase % stride)).expand(m, n)
    if include_self:
        rule = rule | torch.eye(m, n, dtype=torch.bool, device=query.device)
    return rule & _softmax.visible(m, n, key_padding_mask, causal, query.device)


def bound(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None = None,
    *,
    stride: int,
    phase: int = 0,
    include_self: bool = False,
    key_padding_mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> dict[str, Tensor]:
    """S of the componentwise bound |error| <= K u S; see `_softmax.bound`."""
    seen = visible(query, key, stride, phase, include_self, key_padding_mask, causal)
    key, value = _softmax.unpadded(key, value, key_padding_mask)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _softmax.bound(query, key, value, seen, grad_out, grad_lse, scale=scale, dropout_p=dropout_p, seed=seed)
