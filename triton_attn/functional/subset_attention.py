"""Attention to a subset of the keys: the public call and its row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_attn import arguments, operators
from triton_attn.functional import _softmax as softmax
from triton_attn.mechanism import Case, Code, Input, Kernel, Mechanism, Options, Reduction, Sizes, Tensors, Work
from triton_attn.portable.subset_attention import subset_attention as portable
from triton_attn.reference.attention import attention
from triton_attn.reference.subset_attention import bound
from triton_attn.reference.subset_attention import subset_attention as reference


def subset_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    indices: Tensor,
    include_self: bool = True,
    key_padding_mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Any:
    """Softmax attention to a subset of the keys that all queries share, and to each query's own key.

    out_i = sum_j dropout(softmax_j(scale <query_i, key_j>)) value_j over j in indices, each once, and j = i if include_self.
    Cost O(Nq K). `triton_attn.sparse_attention` chooses the indices by a rule.

    Args:
        query: (B, H, Nq, D), float16, bfloat16, float32 or float64. Any strides; kernels never copy an argument for its layout.
        key: (B, Hk, Nk, D); Hk divides H, and query head h uses key head h // (H / Hk).
        value: (B, Hk, Nk, E). D and E of any size, powers of two or not; kernels serve up to 256.
        indices: (K,), (B, K) or (B, Hk, K), int32 or int64, in any order, none at all included; duplicates count once. 0 to
            Nk - 1; on a CPU others raise, elsewhere, where looking would wait for the device, they name no key.
        include_self: query i also sees key i; Nq must be Nk.
        key_padding_mask: (B, Nk) boolean, True = ignore. What lies there, NaN included, reaches neither output nor gradients.
        causal: False; True (only where Nq == Nk); "top_left": query i sees keys up to i; "bottom_right": up to i + Nk - Nq.
        scale: multiplies the scores; D ** -0.5 if None.
        dropout_p: share of attention weights set to zero, as in `triton_attn.attention`.
        return_lse: also return the log-sum-exp.

    Returns:
        (B, H, Nq, E) in the inputs' dtype, contiguous; with return_lse also (B, H, Nq), natural logarithm, float32 (float64
        for float64), differentiable. A query that sees no key gives 0, lse -inf and no gradient.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.
        Unsupported: use_backend("triton") was asked for and no kernel can serve the call.

    Source: the sparse residual block of an OpenCLIP fork, as it was meant; Child et al., "Generating Long Sequences with Sparse
    Transformers", 2019, and Zaheer et al., "Big Bird", 2020, for columns that every query sees.
    """
    if isinstance(indices, Tensor) and isinstance(key, Tensor) and key.ndim == 4 and indices.ndim in (1, 2):
        b, g = key.shape[:2]
        if indices.ndim == 2 and indices.shape[0] not in (1, b):
            allowed = f"(K,), ({b}, K) or ({b}, {g}, K)"
            raise arguments.ArgumentError(ROW.name, "indices", f"has shape {tuple(indices.shape)}; allowed: {allowed}")
        indices = (indices[None] if indices.ndim == 1 else indices)[:, None].expand(b, g, -1)
    tensors = {"query": query, "key": key, "value": value, "indices": indices, "key_padding_mask": key_padding_mask, "seed": None}
    sizes = softmax.check(ROW, tensors)
    if sizes["n"] == 0 and sizes["k"] > 0 and indices.device.type == "cpu":
        raise arguments.ArgumentError(ROW.name, "indices", f"names {sizes['k']}, and there are no keys; allowed: none at all")
    arguments.inside(ROW, "indices", indices, sizes["n"])
    if arguments.flag(ROW, "include_self", include_self) and sizes["m"] != sizes["n"]:
        raise arguments.ArgumentError(
            ROW.name, "include_self", f"is True with {sizes['m']} queries and {sizes['n']} keys; allowed: as many of each"
        )
    options = {"include_self": include_self, **softmax.common_options(ROW, sizes, causal, scale, dropout_p)}
    return operators.run(ROW, tensors, options, return_lse)


def _pointers() -> Code:
    from triton_attn.kernels.subset_attention import SPACES, subset_attention, subset_attention_backward, tile_key

    return Code(subset_attention, subset_attention_backward, SPACES, tile_key)


def _work(sizes: Sizes, options: Options, itemsize: int) -> Work:
    """Of distinct indices; which of them a causal call or a query's own key makes superfluous depends on their values."""
    pairs = sizes["m"] * (sizes["k"] + bool(options.get("include_self", True)))
    return softmax.work(sizes, itemsize, pairs, sizes["n"] if options.get("include_self", True) else sizes["k"])


def _sdpa_over_all_keys(query: Tensor, key: Tensor, value: Tensor, *, causal: bool | str = False, **other: Any) -> Tensor:
    """torch's dense call: what subset attention stands in for. Not the same function."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=bool(causal), enable_gqa=query.shape[1] != key.shape[1])


def _sdpa_on_a_copy(query: Tensor, key: Tensor, value: Tensor, *, indices: Tensor, **other: Any) -> Tensor:
    """torch's call on the keys gathered: the same function, but for a query's own key, and where indices repeat."""
    places = indices[..., None]
    keys, values = (x.gather(2, places.expand(*indices.shape, x.shape[3])) for x in (key, value))
    return F.scaled_dot_product_attention(query, keys, values, enable_gqa=query.shape[1] != key.shape[1])


def _case(name: str, b: int, h: int, g: int, m: int, n: int, k: int, d: int, e: int, **options: Any) -> Case:
    sizes = {"b": b, "h": h, "g": g, "m": m, "n": n, "k": k, "d": d, "e": e}
    return Case(name, sizes, {"indices": "random", **options})


def _probes(width: int, plain: bool) -> tuple[Case, ...]:
    if plain:
        return (_case("causal", 2, 8, 4, 1024, 1024, 128, width, width, causal="top_left", include_self=False),)
    riders: Options = {"causal": "bottom_right", "key_padding_mask": "random", "dropout_p": 0.1}
    return (_case("everything", 2, 8, 4, 1000, 1000, 130, width - 4, width - 4, **riders),)


def _every_key(tensors: Tensors, options: Options) -> Mapping[str, Any]:
    b, g, n = tensors["key"].shape[:3]
    return {"indices": torch.arange(n).expand(b, g, n)}


ROW = Mechanism(
    name="subset_attention",
    summary="softmax attention to a subset of the keys, and the query's own",
    function=subset_attention,
    reference=reference,
    portable=portable,
    bound=bound,
    kernels=(Kernel("pointers", softmax.COMPILED, _pointers, softmax.LAUNCHES, softmax.too_wide),),
    inputs=softmax.inputs(indices=Input("b g k", kind="index", into="n")),
    options={"include_self": "bool", "causal": "str", "scale": "float", "dropout_p": "float"},
    outputs=softmax.OUTPUTS,
    more="return_lse",
    work=_work,
    cases=(
        _case("subset and own key", 2, 2, 2, 40, 40, 9, 16, 16),
        _case("subset alone", 1, 4, 2, 17, 45, 20, 24, 16, include_self=False),
        _case("causal", 1, 2, 2, 40, 40, 20, 16, 16, causal=True),
        _case("causal, fewer queries", 1, 2, 1, 18, 40, 19, 16, 16, include_self=False, causal="bottom_right"),
        _case("causal, fewer keys", 1, 2, 1, 22, 18, 20, 16, 16, include_self=False, causal="bottom_right"),
        _case("padded keys", 2, 2, 2, 36, 36, 12, 16, 16, key_padding_mask="random"),
        _case("padded keys, subset alone", 2, 2, 1, 20, 28, 12, 24, 16, key_padding_mask="random", include_self=False),
        _case("padded before the beginning", 1, 2, 1, 56, 56, 44, 16, 16, indices="distinct", causal=True, key_padding_mask="prefix"),
        _case("dropout", 1, 2, 1, 20, 20, 6, 16, 16, dropout_p=0.2, causal="top_left"),
    ),
    probes=_probes,
    workloads={
        "cpu": (_case("one key in eight", 1, 12, 12, 8192, 8192, 1024, 64, 64, indices="distinct"),),
        "cuda": (_case("one key in eight", 1, 16, 16, 16384, 16384, 2048, 128, 128, indices="distinct"),),
    },
    peers={"torch SDPA over all keys": _sdpa_over_all_keys, "torch SDPA on a copy, without own keys": _sdpa_on_a_copy},
    laws=softmax.PATTERN_LAWS,
    equal_lengths=lambda options: options.get("causal") is True or bool(options.get("include_self", True)),
    reduction=Reduction(_every_key, attention),
    exact_pairs=False,
)
