"""Hydra attention: branches of queries over one state of keys and values, which `linear_attention` sums once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_attn import arguments
from triton_attn.arguments import ArgumentError, ArgumentTypeError
from triton_attn.functional.linear_attention import FEATURE_MAPS, linear_attention

VARIANTS = ("branches", "meta")
_WHO: Any = SimpleNamespace(name="hydra_attention")


def hydra_attention(
    query_branches: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    variant: str = "branches",
    feature_map: str = "crelu",
    causal: bool = False,
    scale: float | None = None,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Linear attention of R branches of queries to the same keys and values.

    "branches": out_ri = phi(q_ri)^T S / (<phi(q_ri), z> + eps / scale), with S = sum_j phi(k_j) v_j^T and z = sum_j phi(k_j) of a head
    computed once, whatever R is: O(N D E (1 + R)) in place of O(2 R N D E).
    "meta": out_ri = u(q_ri) * sum_j u(k_j) * v_j, elementwise, with u(x) = x / |x|: as many heads as features, no denominator, O(N D).

    Args:
        query_branches: (B, R, H, N, D), float16, bfloat16, float32 or float64.
        key: (B, H, M, D).
        value: (B, H, M, E); E = D for "meta".
        variant: "branches" or "meta".
        feature_map: phi of "branches", as in `triton_attn.linear_attention`.
        causal: query i sees keys 0..i; N must be M.
        scale: multiplies the scores of "branches", which only weighs them against eps; 1 if None.
        eps: added to the sum of the scores of "branches".
        key_padding_mask: (B, M) boolean, True = ignore.

    Returns:
        (B, R, H, N, E) in the inputs' dtype.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.
        Unsupported: use_backend("triton") was asked for and no kernel can serve the call; "meta" has none.

    Source: HydraAttention of Linear-ViT, with one state in place of one for each branch; "meta" is Bolya et al., "Hydra Attention:
    Efficient Attention with Many Heads", 2022.
    """
    arguments.choice(_WHO, "variant", variant, VARIANTS)
    arguments.choice(_WHO, "feature_map", feature_map, FEATURE_MAPS)
    if not isinstance(query_branches, Tensor):
        raise ArgumentTypeError(_WHO.name, "query_branches", f"is a {type(query_branches).__name__}; allowed: torch.Tensor")
    if query_branches.ndim != 5:
        raise ArgumentError(_WHO.name, "query_branches", f"has shape {tuple(query_branches.shape)}; allowed: 5 axes, 'b r h n d'")
    if not isinstance(key, Tensor) or key.ndim != 4 or key.shape[1] != query_branches.shape[2]:
        found = tuple(key.shape) if isinstance(key, Tensor) else type(key).__name__
        raise ArgumentError(_WHO.name, "key", f"has shape {found}; allowed: 'b h m d' with h = {query_branches.shape[2]}")
    b, r, h, n, d = query_branches.shape
    # the branches of a head are query heads that share its keys
    query = query_branches.transpose(1, 2).reshape(b, h * r, n, d)
    if variant == "meta":
        out = _meta(query, key, value, r, causal, key_padding_mask)
    else:
        out = linear_attention(
            query, key, value, feature_map=feature_map, causal=causal, scale=scale, eps=eps, key_padding_mask=key_padding_mask
        )
    branches: Tensor = out.view(b, h, r, n, out.shape[3]).transpose(1, 2)
    return branches


def _meta(query: Tensor, key: Tensor, value: Tensor, branches: int, causal: bool, key_padding_mask: Tensor | None) -> Tensor:
    """Products feature by feature, in float32 at the least. A vector of zeros stays one."""
    if value.shape != key.shape:
        raise ArgumentError(_WHO.name, "value", f"has shape {tuple(value.shape)}; allowed with variant='meta': key's, {tuple(key.shape)}")
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        allowed = f"{(query.shape[0], key.shape[1], 'M', query.shape[3])}"
        raise ArgumentError(_WHO.name, "key", f"has shape {tuple(key.shape)}; allowed: {allowed}")
    if arguments.flag(_WHO, "causal", causal) and query.shape[2] != key.shape[2]:
        complaint = f"is True with {query.shape[2]} queries and {key.shape[2]} keys; allowed: as many of each"
        raise ArgumentError(_WHO.name, "causal", complaint)
    if key_padding_mask is not None:
        hidden = key_padding_mask[:, None, :, None]
        key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
    wide = torch.promote_types(query.dtype, torch.float32)
    products = F.normalize(key.to(wide), dim=-1) * value.to(wide)
    state = products.cumsum(2) if causal else products.sum(2, keepdim=True)
    return (F.normalize(query.to(wide), dim=-1) * state.repeat_interleave(branches, 1)).to(query.dtype)
