"""Attention to a subset of the keys by its definition, in naive PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from triton_attn.reference import _softmax


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
    """Softmax attention over the keys that `indices` (B, Hk, K) name, each once; with include_self query i also sees key i."""
    seen = visible(query, key, indices, include_self, key_padding_mask, causal)
    key, value = _softmax.unpadded(key, value, key_padding_mask)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out, lse = _softmax.attend(query, key, value, seen, scale=scale, dropout_p=dropout_p, seed=seed)
    return (out, lse) if return_lse else out


def visible(query: Tensor, key: Tensor, indices: Tensor, include_self: bool, key_padding_mask: Tensor | None, causal: bool | str) -> Tensor:
    """Boolean (B, H, Nq, Nk): which key each query sees. An index outside of the keys names none."""
    (h, m), (g, n) = query.shape[1:3], key.shape[1:3]
    inside = (indices >= 0) & (indices < n)
    # one more place for those outside
    chosen = torch.zeros(*indices.shape[:2], n + 1, dtype=torch.bool, device=query.device)
    chosen = chosen.scatter(2, indices.where(inside, n).long(), True)[:, :, None, :n]
    rule = chosen.repeat_interleave(h // max(g, 1), 1).expand(-1, -1, m, -1)
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
    indices: Tensor,
    include_self: bool = True,
    key_padding_mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> dict[str, Tensor]:
    """S of the componentwise bound |error| <= K u S; see `_softmax.bound`."""
    seen = visible(query, key, indices, include_self, key_padding_mask, causal)
    key, value = _softmax.unpadded(key, value, key_padding_mask)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _softmax.bound(query, key, value, seen, grad_out, grad_lse, scale=scale, dropout_p=dropout_p, seed=seed)
