"""Hydra attention with a head for each feature, in stock operators: O(N D), differentiable, one sum for all branches of a head."""

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
    """u(q) times the running or the whole sum of u(k) * v, in float32 at least."""
    wide = torch.promote_types(query_branches.dtype, torch.float32)
    if key_padding_mask is not None:
        hidden = key_padding_mask[:, None, :, None]
        key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
    query, key, value = query_branches.to(wide), key.to(wide), value.to(wide)
    products = key * _inverse(key) * value
    state = products.sum(2)
    seen = products.cumsum(2) if causal else state[:, :, None]
    out, inverse = query * seen[:, None], _inverse(query)
    # in place: fresh memory costs more
    out = out * inverse if out.requires_grad else out.mul_(inverse)
    out = out.to(query_branches.dtype).contiguous()
    return (out, state) if return_state else out


def _inverse(x: Tensor) -> Tensor:
    """1 / |x|; 0 for zeros, so that they stay zeros, and get no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse: Tensor = norm.masked_fill(norm == 0, torch.inf).reciprocal()
    return inverse
