"""Hydra attention in stock operators: O(N), differentiable, the state of a head summed once in float32 for all branches."""

from __future__ import annotations

from torch import Tensor

from triton_attn.portable._linear import linear_attention


def hydra_attention(
    query_branches: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: str = "crelu",
    causal: bool = False,
    scale: float | None = None,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Hydra attention in O(N) time and memory."""
    out, state, normalizer = linear_attention(
        query_branches,  # members of a key head
        key,
        value,
        feature_map=feature_map,
        causal=causal,
        scale=scale,
        eps=eps,
        key_padding_mask=key_padding_mask,
        return_state=True,
    )
    return (out, state, normalizer) if return_state else out
