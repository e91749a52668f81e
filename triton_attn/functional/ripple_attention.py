"""Ripple attention: linear attention to keys and values that were averaged over cells of a grid, which grow stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triton_attn import arguments
from triton_attn.arguments import ArgumentError, ArgumentTypeError
from triton_attn.functional import _softmax as softmax
from triton_attn.functional.linear_attention import FEATURE_MAPS, linear_attention
from triton_attn.functional.linear_attention import ROW as LINEAR
from triton_attn.functional.pool_tokens import pool_tokens

LISTS = (Sequence, nn.ModuleList, nn.ParameterList)
Layer = tuple[Tensor, Tensor, Tensor, Tensor]  # weight and bias of a linear layer, weight and bias of the LayerNorm after it
# what linear attention's call and this one have in common, under this one's name
_WHO = replace(
    LINEAR,
    name="ripple_attention",
    inputs={name: LINEAR.inputs[name] for name in ("query", "key", "value", "key_padding_mask")},
)


def ripple_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pool: Sequence[Layer],
    expand: Sequence[Layer],
    *,
    num_stages: int = 3,
    grid_size: tuple[int, int] | None = None,
    num_prefix_tokens: int = 1,
    feature_map: str = "crelu",
    key_padding_mask: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Linear attention of every query to pooled keys: O(N D E) for the queries, a fraction of it for the keys.

    For each stage s, while there is more than one cell: cells of 2 x 2 (of 2 without a grid) become one, key and value being means
    over the tokens that are not masked, and k <- k + GELU(LN(W_s k + b_s)). With c_j the number of tokens in cell j,

        out_i = sum_j c_j <phi(q_i), phi(k_j)> v_j / (sum_j c_j <phi(q_i), phi(k_j)> + eps),

    then, for each stage that pooled, backwards: out <- out + GELU(LN(W'_s out + b'_s)). Prefix tokens, such as a class token, are keys
    that are never pooled. With num_stages = 0 this is `triton_attn.linear_attention`. Pooling and the linear attention run in kernels,
    `triton_attn.pool_tokens` and `triton_attn.linear_attention`; the layers W and W' in torch.

    Args:
        query: (B, H, N, D), float16, bfloat16, float32 or float64.
        key: (B, H, N, D); prefix tokens first, then the cells of the grid row by row.
        value: (B, H, N, E).
        pool: one (weight (D, D), bias (D,), norm_weight (D,), norm_bias (D,)) for each stage.
        expand: the same at width E.
        num_stages: 0 to len(pool).
        grid_size: (rows, columns) of the tokens after the prefix; None: a sequence.
        num_prefix_tokens: 0 and more.
        feature_map: phi, as in `triton_attn.linear_attention`; not "identity", whose scores may be negative.
        key_padding_mask: (B, N) boolean, True = ignore: absent from means, counts and sums.
        eps: added to the sum of the scores; 0 and more. With 0, a query whose scores are all 0, or that sees no key, gives NaN, 0 / 0.

    Returns:
        (B, H, N, E) in the inputs' dtype.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.
        Unsupported: use_backend("triton") was asked for and no kernel can serve the pooling or the linear attention.

    Source: RippleAttention of Linear-ViT, with pooling before phi (after it scores may be negative), over the image's two axes, weighted
    by counts. It shares only the name with Zheng et al., "Ripple Attention for Visual Perception with Sub-quadratic Complexity", 2021.
    """
    tensors = {"query": query, "key": key, "value": value, "key_padding_mask": key_padding_mask}
    sizes = softmax.check(_WHO, tensors)
    n, h, g = sizes["n"], sizes["h"], sizes["g"]
    if sizes["m"] != n or h != g:
        raise ArgumentError(_WHO.name, "key", f"has {g} heads and {n} positions; allowed: query's, {h} and {sizes['m']}")
    if arguments.choice(_WHO, "feature_map", feature_map, FEATURE_MAPS) == "identity":
        raise ArgumentError(_WHO.name, "feature_map", "is 'identity'; allowed: 'elu', 'relu', 'crelu'")
    prefix = arguments.whole(_WHO, "num_prefix_tokens", num_prefix_tokens, 0, n)
    for name, layers in (("pool", pool), ("expand", expand)):
        if not isinstance(layers, LISTS):
            raise ArgumentTypeError(_WHO.name, name, f"is a {type(layers).__name__}; allowed: a list of layers, four tensors each")
    stages = arguments.whole(_WHO, "num_stages", num_stages, 0, min(len(pool), len(expand)))
    grid = _grid(grid_size, n - prefix)
    eps = arguments.finite(_WHO, "eps", eps)
    if eps < 0:
        raise ArgumentError(_WHO.name, "eps", f"is {eps}; allowed: 0 and more")
    for name, layers, width in (("pool", pool, sizes["d"]), ("expand", expand, sizes["e"])):
        for stage in range(stages):
            _check_layer(f"{name}[{stage}]", layers[stage], width)

    counted = query.new_ones(query.shape[0], n, dtype=torch.promote_types(query.dtype, torch.float32))
    if key_padding_mask is not None:
        counted = counted.masked_fill(key_padding_mask, 0.0)
    first = [key[:, :, :prefix], value[:, :, :prefix], counted[:, :prefix]]
    key, value, count = key[:, :, prefix:], value[:, :, prefix:], counted[:, prefix:]
    weights: dict[str, Any] = {"key_padding_mask": None if key_padding_mask is None else key_padding_mask[:, prefix:]}
    pooled, most = 0, 1
    while pooled < stages and grid[0] * grid[1] > 1:
        value = pool_tokens(value, rows=grid[0], **weights)
        key, count = pool_tokens(key, rows=grid[0], **weights, return_count=True)
        weights = {"count": count}
        key = key + _layer(key, pool[pooled])
        most *= min(grid[0], 2) * 2
        grid = ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
        pooled += 1
    key, value = (torch.cat((a, b), 2) for a, b in zip(first, (key, value), strict=False))
    count = torch.cat((first[2], count), 1)
    gone = count == 0 if key_padding_mask is not None else None
    if gone is not None:  # what was never pooled may be NaN
        key, value = (x.masked_fill(gone[:, None, :, None], 0.0) for x in (key, value))
    # counts relative to a full cell's, or products of large ones would leave float16
    full = 1.0 / most
    out = _weighted(query, key, value, (count * full)[:, None, :, None].to(key.dtype), feature_map, eps * full, gone)
    for stage in reversed(range(pooled)):
        out = out + _layer(out, expand[stage])
    return out


def _grid(given: object, tokens: int) -> tuple[int, int]:
    if given is None:
        return 1, tokens
    allowed = f"two sizes whose product is {tokens}, the tokens after the prefix"
    if not isinstance(given, (list, tuple)) or len(given) != 2:
        raise ArgumentTypeError(_WHO.name, "grid_size", f"is {given!r}; allowed: {allowed}")
    rows, columns = (arguments.whole(_WHO, "grid_size", size, 0) for size in given)
    if rows * columns != tokens:
        raise ArgumentError(_WHO.name, "grid_size", f"is {given}; allowed: {allowed}")
    return rows, columns


def _check_layer(name: str, layer: Any, width: int) -> None:
    parts: list[Any] = list(layer) if isinstance(layer, LISTS) else [layer]
    if not isinstance(layer, LISTS) or not all(isinstance(part, Tensor) for part in parts):
        found = ", ".join(type(part).__name__ for part in parts)
        raise ArgumentTypeError(_WHO.name, name, f"is {found}; allowed: four tensors, a linear layer and a LayerNorm")
    shapes = [tuple(part.shape) for part in parts]
    allowed = [(width, width), (width,), (width,), (width,)]
    if shapes != allowed:
        raise ArgumentError(_WHO.name, name, f"has shapes {shapes}; allowed: {allowed}, a linear layer and a LayerNorm")


def _layer(x: Tensor, layer: Layer) -> Tensor:
    weight, bias, norm_weight, norm_bias = layer
    return F.gelu(F.layer_norm(F.linear(x, weight, bias), bias.shape, norm_weight, norm_bias))


def _weighted(query: Tensor, key: Tensor, value: Tensor, count: Tensor, feature_map: str, eps: float, gone: Tensor | None) -> Tensor:
    """Linear attention in which each key counts `count` times."""
    if feature_map in ("relu", "crelu"):  # c phi(k) = phi(c k)
        key = key * count
    else:
        query, key, feature_map = F.elu(query) + 1, (F.elu(key) + 1) * count, "identity"
    out: Tensor = linear_attention(query, key, value, feature_map=feature_map, eps=eps, key_padding_mask=gone)
    return out
