"""Softmax attention over whatever each query sees, in naive PyTorch, and its bound: what the patterns' definitions share."""

from __future__ import annotations

import math

import torch
from einops import repeat
from torch import Tensor

from triton_attn.reference import _dropout

UNDERFLOW = 2.0**-13  # float16's smallest number as a share of its roundoff


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    *,
    added: Tensor | None = None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out, lse): softmax(scale Q K^T + added) V over the keys that `seen` (broadcastable to (B, H, M, N)) shows.

    A row that sees none gives 0 and lse -inf. Dtype: the inputs' own.
    """
    key, value = grouped(query, key, value)
    scores = torch.einsum("bhmd,bhnd->bhmn", query, key) * scale
    if added is not None:
        scores = scores + added
    seen = seen.expand(scores.shape)
    empty = ~seen.any(-1, keepdim=True)
    # a row without keys gets flat scores, so that no NaN arises in it or in its gradient
    scores = scores.masked_fill(~seen, -math.inf).masked_fill(empty, 0.0)
    weights = scores.softmax(-1).masked_fill(~seen, 0.0).to(value.dtype)
    if dropout_p > 0:
        assert seed is not None
        weights = weights * kept(seed, dropout_p, weights) * _dropout.rescale(dropout_p)
    out = torch.einsum("bhmn,bhnd->bhmd", weights, value)
    wide = torch.promote_types(scores.dtype, torch.float32)
    return out, scores.to(wide).logsumexp(-1).masked_fill(empty[..., 0], -math.inf)


def bound(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None = None,
    *,
    added: Tensor | None = None,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> dict[str, Tensor]:
    """S of the componentwise bound |error| <= K u S: attention and its gradients with every term replaced by its magnitude.

    A rounding of the scores by u moves a weight p by p (A + E_p[A]), A being the scores of the magnitudes (Higham, "Accuracy and
    Stability of Numerical Algorithms", section 3.1). Weights and dS are held in the dtype of the products: in float16 what is below its
    smallest number is lost, which adds UNDERFLOW to each of them, and nothing that counts in other dtypes. float64 in, float64 out.
    """
    group = query.shape[1] // key.shape[1] if key.shape[1] else 1
    wide_key, wide_value = grouped(query, key, value)
    scores = query @ wide_key.mT * scale
    size = query.abs() @ wide_key.mT.abs() * abs(scale)
    if added is not None:
        scores, size = scores + added, size + added.abs()
    seen = seen.expand(scores.shape)
    empty = ~seen.any(-1, keepdim=True)
    scores = scores.masked_fill(~seen, -math.inf).masked_fill(empty, 0.0)
    p, size = scores.softmax(-1).masked_fill(~seen, 0.0), size.masked_fill(~seen, 0.0)
    mean = (p * size).sum(-1, keepdim=True)
    spread = p * (1.0 + size + mean) + UNDERFLOW * seen
    z = kept(seed, dropout_p, p) * _dropout.rescale(dropout_p) if dropout_p > 0 and seed is not None else torch.ones_like(p)
    s_out = (spread * z) @ wide_value.abs()
    lse = scores.logsumexp(-1).masked_fill(empty[..., 0], 0.0)
    dp, s_dp = (grad_out @ wide_value.mT) * z, (grad_out.abs() @ wide_value.mT.abs()) * z
    out = (p * z) @ wide_value
    delta = (grad_out * out).sum(-1, keepdim=True)
    s_delta = (grad_out.abs() * (s_out + out.abs())).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta, s_delta = delta - grad_lse[..., None], s_delta + grad_lse.abs()[..., None]
    s_ds = abs(scale) * (spread * (dp - delta).abs() + p * (s_dp + s_delta) + UNDERFLOW * seen)
    return {
        "out": s_out,
        "lse": (lse.abs() + mean[..., 0] + 1.0).masked_fill(empty[..., 0], 0.0),
        "query": s_ds @ wide_key.abs(),
        "key": _summed(s_ds.mT @ query.abs(), group),
        "value": _summed((spread * z).mT @ grad_out.abs(), group),
    }


def _summed(x: Tensor, group: int) -> Tensor:
    """Over the query heads that share a key head."""
    return x.reshape(x.shape[0], x.shape[1] // group if group else 0, group, *x.shape[2:]).sum(2)


def grouped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value once for every query head."""
    group = query.shape[1] // key.shape[1] if key.shape[1] else 1
    wide_key, wide_value = (repeat(x, "b g n d -> b (g r) n d", r=group) for x in (key, value))
    return wide_key, wide_value


def unpadded(key: Tensor, value: Tensor, key_padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Zeros where keys are padded, ahead of the products: 0 * NaN is NaN."""
    if key_padding_mask is None:
        return key, value
    hidden = key_padding_mask[:, None, :, None]
    return key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)


def visible(m: int, n: int, key_padding_mask: Tensor | None, causal: bool | str, device: torch.device) -> Tensor:
    """Boolean, broadcastable to (B, H, m, n): keys that are not padded and not in the future."""
    seen = torch.ones(1, 1, m, n, dtype=torch.bool, device=device)
    if causal:
        seen = seen.tril(n - m if causal == "bottom_right" else 0)
    return seen if key_padding_mask is None else seen & ~key_padding_mask[:, None, None, :]


def kept(seed: Tensor, dropout_p: float, weights: Tensor) -> Tensor:
    """Dropout's mask for weights (B, H, M, N)."""
    b, h, m, n = weights.shape
    index = [torch.arange(size, device=weights.device) for size in (b * h, m, n)]
    return _dropout.keep(seed, dropout_p, *index).view(b, h, m, n)
