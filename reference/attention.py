"""Scaled dot-product attention by its definition, in naive PyTorch. It materialises every score."""

from __future__ import annotations

import math

import torch
from einops import repeat
from torch import Tensor

from triton_attn.reference import _dropout


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
    if key_padding_mask is not None:
        # ahead of the products: 0 * NaN is NaN
        hidden = key_padding_mask[:, None, :, None]
        key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
    group = query.shape[1] // key.shape[1] if key.shape[1] else 1
    key, value = (repeat(x, "b g n d -> b (g r) n d", r=group) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bhmd,bhnd->bhmn", query, key) * scale
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask
    seen = visible(scores, mask, key_padding_mask, causal)
    empty = ~seen.any(-1, keepdim=True)
    # a row without keys gets flat scores, so that no NaN arises in it or in its gradient
    scores = scores.masked_fill(~seen, -math.inf).masked_fill(empty, 0.0)
    weights = scores.softmax(-1).masked_fill(~seen, 0.0).to(value.dtype)
    if dropout_p > 0:
        assert seed is not None
        weights = weights * kept(seed, dropout_p, weights) * _dropout.rescale(dropout_p)
    out = torch.einsum("bhmn,bhnd->bhmd", weights, value)
    if not return_lse:
        return out
    wide = torch.promote_types(scores.dtype, torch.float32)
    return out, scores.to(wide).logsumexp(-1).masked_fill(empty[..., 0], -math.inf)


def visible(scores: Tensor, mask: Tensor | None, key_padding_mask: Tensor | None, causal: bool | str) -> Tensor:
    """Boolean, of the shape of scores: which key each query sees."""
    m, n = scores.shape[-2:]
    seen = torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
    if mask is not None:
        seen = seen & (mask if mask.dtype == torch.bool else mask != -math.inf)
    if key_padding_mask is not None:
        seen = seen & ~key_padding_mask[:, None, None, :]
    if causal:
        seen = seen.tril(n - m if causal == "bottom_right" else 0)
    return seen


def kept(seed: Tensor, dropout_p: float, weights: Tensor) -> Tensor:
    """Dropout's mask for weights (B, H, M, N)."""
    b, h, m, n = weights.shape
    index = [torch.arange(size, device=weights.device) for size in (b * h, m, n)]
    return _dropout.keep(seed, dropout_p, *index).view(b, h, m, n)


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
    """S of the componentwise bound |error| <= K u S: attention and its gradients with every term replaced by its magnitude.

    A rounding of the scores by u moves a weight p by p (A + E_p[A]), A being the scores of the magnitudes (Higham, "Accuracy and
    Stability of Numerical Algorithms", section 3.1). float64 in, float64 out.
    """
    group = query.shape[1] // key.shape[1] if key.shape[1] else 1
    if key_padding_mask is not None:
        hidden = key_padding_mask[:, None, :, None]
        key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
    wide_key, wide_value = (repeat(x, "b g n d -> b (g r) n d", r=group) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query @ wide_key.mT * scale
    size = query.abs() @ wide_key.mT.abs() * abs(scale)
    if mask is not None and mask.dtype != torch.bool:
        scores, size = scores + mask, size + mask.abs()
    seen = visible(scores, mask, key_padding_mask, causal)
    empty = ~seen.any(-1, keepdim=True)
    scores = scores.masked_fill(~seen, -math.inf).masked_fill(empty, 0.0)
    p, size = scores.softmax(-1).masked_fill(~seen, 0.0), size.masked_fill(~seen, 0.0)
    mean = (p * size).sum(-1, keepdim=True)
    spread = p * (1.0 + size + mean)
    z = kept(seed, dropout_p, p) * _dropout.rescale(dropout_p) if dropout_p > 0 and seed is not None else torch.ones_like(p)
    s_out = (spread * z) @ wide_value.abs()
    lse = scores.logsumexp(-1).masked_fill(empty[..., 0], 0.0)
    dp, s_dp = (grad_out @ wide_value.mT) * z, (grad_out.abs() @ wide_value.mT.abs()) * z
    out = (p * z) @ wide_value
    delta = (grad_out * out).sum(-1, keepdim=True)
    s_delta = (grad_out.abs() * (s_out + out.abs())).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta, s_delta = delta - grad_lse[..., None], s_delta + grad_lse.abs()[..., None]
    s_ds = abs(scale) * (spread * (dp - delta).abs() + p * (s_dp + s_delta))
    return {
        "out": s_out,
        "lse": (lse.abs() + mean[..., 0] + 1.0).masked_fill(empty[..., 0], 0.0),
        "query": s_ds @ wide_key.abs(),
        "key": (s_ds.mT @ query.abs()).unflatten(1, (key.shape[1], group)).sum(2),
        "value": ((spread * z).mT @ grad_out.abs()).unflatten(1, (key.shape[1], group)).sum(2),
    }
