"""Hydra attention with a head for each feature, by its definition in naive PyTorch, and its bound."""

from __future__ import annotations

import torch
from torch import Tensor


def meta_hydra_attention(
    query_branches: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """out_rid = sum_j a_rijd v_jd, a_rijd = u(q_ri)_d u(k_j)_d, beside the sum over keys; u(x) = x / |x|, u(0) = 0, in float32 at least."""
    wide = torch.promote_types(query_branches.dtype, torch.float32)
    q, k, v = query_branches.to(wide), key.to(wide), value.to(wide)
    if key_padding_mask is not None:
        hidden = key_padding_mask[:, None, :, None]
        k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
    u_q, u_k = _unit(q), _unit(k)
    scores = torch.einsum("brhmd,bhnd->brhdmn", u_q, u_k)
    scores = scores.tril() if causal else scores
    out = torch.einsum("brhdmn,bhnd->brhmd", scores, v).to(query_branches.dtype)
    return (out, (u_k * v).sum(2)) if return_state else out


def bound(
    query_branches: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    grad_state: Tensor | None = None,
    *,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """S of the componentwise bound |error| <= K u S, to first order: unit vectors have small relative errors, sums those of their terms.

    Higham, "Accuracy and Stability of Numerical Algorithms", sections 3.1 and 4.2.
    """
    if key_padding_mask is not None:
        hidden = key_padding_mask[:, None, :, None]
        key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
    norm_q, norm_k = _norm(query_branches), _norm(key)
    u_q, u_k = _unit(query_branches).abs(), _unit(key).abs()
    terms, asked = u_k * value.abs(), (grad_out.abs() * u_q).sum(1)
    seen = (terms.cumsum(2) if causal else terms.sum(2, keepdim=True))[:, None]
    later = asked.flip(2).cumsum(2).flip(2) if causal else asked.sum(2, keepdim=True)
    if grad_state is not None:
        later = later + grad_state.abs()[:, :, None]
    return {
        "out": 3 * u_q * seen,
        "state": 3 * terms.sum(2),
        "query_branches": _through(3 * grad_out.abs() * seen, u_q, norm_q),
        "key": _through(3 * value.abs() * later, u_k, norm_k),
        "value": 3 * u_k * later,
    }


def _through(asked: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    """Through x / |x|, of errors `asked` and of those of the projection."""
    size = (asked + 2 * unit * (unit * asked).sum(-1, keepdim=True)) / norm.masked_fill(norm == 0, 1.0)
    return size.masked_fill(norm == 0, 0.0)


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm


def _unit(x: Tensor) -> Tensor:
    """x / |x|; zeros stay zeros, and get no gradient."""
    absent = _norm(x.detach()) == 0
    x = x.masked_fill(absent, 0.0)
    return x / torch.where(absent, 1.0, _norm(x))
