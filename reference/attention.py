"""Scaled dot-product attention by its definition, in naive PyTorch. It materialises every score."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from triton_attn.reference import _softmax


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
    """softmax(scale Q K^T + mask) V over the visible keys; a row that sees none gives 0 and lse -inf. Dtype: the inputs' own."""
    seen = visible(query.new_empty(query.shape[2], key.shape[2]), mask, key_padding_mask, causal)
    key, value = _softmax.unpadded(key, value, key_padding_mask)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    added = mask if mask is not None and mask.dtype != torch.bool else None
    out, lse = _softmax.attend(query, key, value, seen, added=added, scale=scale, dropout_p=dropout_p, seed=seed)
    return (out, lse) if return_lse else out


def visible(scores: Tensor, mask: Tensor | None, key_padding_mask: Tensor | None, causal: bool | str) -> Tensor:
    """Boolean, broadcastable to the shape of scores (..., M, N): which key each query sees."""
    m, n = scores.shape[-2:]
    seen = _softmax.visible(m, n, key_padding_mask, causal, scores.device)
    if mask is not None:
        seen = seen & (mask if mask.dtype == torch.bool else mask != -math.inf)
    return seen


def bound(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> dict[str, Tensor]:
    """S of the componentwise bound |error| <= K u S; see `_softmax.bound`."""
    seen = visible(query.new_empty(query.shape[2], key.shape[2]), mask, key_padding_mask, causal)
    key, value = _softmax.unpadded(key, value, key_padding_mask)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    added = mask if mask is not None and mask.dtype != torch.bool else None
    return _softmax.bound(query, key, value, seen, grad_out, grad_lse, added=added, scale=scale, dropout_p=dropout_p, seed=seed)
