"""torch's own call over heads that may share keys."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, is_causal: bool = False, scale: float | None = None) -> Tensor:
    """F.scaled_dot_product_attention with grouped heads where there are any: under dynamic shapes that is decided, not handed on."""
    if query.shape[1] == key.shape[1]:
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, scale=scale)
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=True)
