"""torch's own call over heads that may share keys, at any scale."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

LEAST = 2.0**-126  # smaller scales are 0 in float32, which fused calls compute in


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, is_causal: bool = False, scale: float | None = None) -> Tensor:
    """F.scaled_dot_product_attention with grouped heads where there are any: under dynamic shapes that is decided, not handed on."""
    if scale is not None:
        query, scale = positive(query, scale)
    if query.shape[1] == key.shape[1]:
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, scale=scale)
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=True)


def positive(query: Tensor, scale: float) -> tuple[Tensor, float]:
    """The same scores at a positive scale: torch's fused calls multiply the -inf of a hidden key by it."""
    if scale >= LEAST:
        return query, scale
    return (-query, -scale) if scale <= -LEAST else (query * scale, 1.0)
