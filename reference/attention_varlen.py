"""Attention within packed sequences by its definition, in naive PyTorch: a mask of who stands with whom."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from triton_attn.reference import _softmax
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
    """Softmax attention of each query to the keys of its own sequence, none later than itself if causal, none outside of the window."""
    seen = visible(query, key, cu_seqlens_q, cu_seqlens_k, causal, window_size)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    out, lse = _softmax.attend(q, k, v, seen, scale=scale, dropout_p=dropout_p, seed=seed)
    out, lse = out[0].transpose(0, 1), lse[0]
    return (out, lse) if return_lse else out


def bound(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None = None,
    *,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> dict[str, Tensor]:
    """S of the componentwise bound |error| <= K u S; see `_softmax.bound`."""
    seen = visible(query, key, cu_seqlens_q, cu_seqlens_k, causal, window_size)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    q, k, v, grad = (x.transpose(0, 1)[None] for x in (query, key, value, grad_out))
    lse = None if grad_lse is None else grad_lse[None]
    found = _softmax.bound(q, k, v, seen, grad, lse, scale=scale, dropout_p=dropout_p, seed=seed)
    return {name: size[0] if name == "lse" else size[0].transpose(0, 1) for name, size in found.items()}
