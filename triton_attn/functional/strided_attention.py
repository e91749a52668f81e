"""Strided attention: the public call and its row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from triton_attn import arguments, operators
from triton_attn.functional import _softmax as softmax
from triton_attn.functional._softmax import case
from triton_attn.mechanism import Case, Code, Kernel, Mechanism, Options, Reduction, Sizes, Tensors, Work
from triton_attn.portable.strided_attention import strided_attention as portable
from triton_attn.reference.attention import attention
from triton_attn.reference.strided_attention import bound
from triton_attn.reference.strided_attention import strided_attention as reference


def strided_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    stride: int,
    phase: int = 0,
    include_self: bool = False,
    key_padding_mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Any:
    """Softmax attention to every stride-th key: query i sees keys phase, phase + stride, phase + 2 stride, ...

    out_i = sum_j dropout(softmax_j(scale <query_i, key_j>)) value_j over those j, and over j = i if include_self.
    Keys are read through their strides; nothing is gathered. Cost O(Nq Nk / stride).

    Args:
        query: (B, H, Nq, D), float16, bfloat16, float32 or float64. Any strides; kernels never copy an argument for its layout.
        key: (B, Hk, Nk, D); Hk divides H, and query head h uses key head h // (H / Hk).
        value: (B, Hk, Nk, E). D and E of any size, powers of two or not; kernels serve up to 256.
        stride: distance between the keys that are seen; 1 and more. Longer than Nk: at most one key.
        phase: position of the first of them; 0 to stride - 1.
        include_self: query i also sees key i, once; Nq must be Nk.
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

    Source: StridedAttention of HierarchicalVLM, with phase, own key, masks and gradients; Child et al., "Generating Long Sequences
    with Sparse Transformers", 2019, for the idea.
    """
    tensors = {"query": query, "key": key, "value": value, "key_padding_mask": key_padding_mask, "seed": None}
    sizes = softmax.check(ROW, tensors)
    arguments.whole(ROW, "stride", stride, 1)
    arguments.whole(ROW, "phase", phase, 0, stride - 1)
    if arguments.flag(ROW, "include_self", include_self) and sizes["m"] != sizes["n"]:
        raise arguments.ArgumentError(
            ROW.name, "include_self", f"is True with {sizes['m']} queries and {sizes['n']} keys; allowed: as many of each"
        )
    options = {
        "stride": stride,
        "phase": phase,
        "include_self": include_self,
        **softmax.common_options(ROW, sizes, causal, scale, dropout_p),
    }
    return operators.run(ROW, tensors, options, return_lse)


def _pointers() -> Code:
    from triton_attn.kernels.strided_attention import SPACES, strided_attention, strided_attention_backward, tile_key

    return Code(strided_attention, strided_attention_backward, SPACES, tile_key)


def _work(sizes: Sizes, options: Options, itemsize: int) -> Work:
    m, n = sizes["m"], sizes["n"]
    gridded = len(range(options.get("phase", 0), n, options["stride"]))
    read = n if options.get("include_self") else gridded
    return softmax.work(sizes, itemsize, _pairs(m, n, **{name: options[name] for name in _SHAPING if name in options}), read)


_SHAPING = ("stride", "phase", "include_self", "causal")


def _pairs(m: int, n: int, stride: int, phase: int = 0, include_self: bool = False, causal: bool | str = False) -> int:
    """How many (query, key) pairs are visible."""
    total = 0
    shift = n - m if causal == "bottom_right" else 0
    for i in range(m):
        last = min(i + shift, n - 1) if causal else n - 1
        total += max(last - phase + stride, 0) // stride
        total += include_self and i % stride != phase
    return total


def _sdpa_over_all_keys(query: Tensor, key: Tensor, value: Tensor, *, causal: bool | str = False, **other: Any) -> Tensor:
    """torch's dense call: what strided attention stands in for. Not the same function."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=bool(causal), enable_gqa=query.shape[1] != key.shape[1])


def _sdpa_on_a_copy(
    query: Tensor, key: Tensor, value: Tensor, *, stride: int, phase: int = 0, causal: bool | str = False, **other: Any
) -> Tensor:
    """torch's call on the keys gathered: the same function, unless causal or with a query's own key."""
    if causal or other.get("include_self"):
        raise NotImplementedError("torch has no causal mask of unequal steps")
    keys, values = (x[:, :, phase::stride].contiguous() for x in (key, value))
    return F.scaled_dot_product_attention(query, keys, values, enable_gqa=query.shape[1] != key.shape[1])


def _probes(width: int, plain: bool) -> tuple[Case, ...]:
    return softmax.probes(width, plain, stride=3, phase=1, include_self=not plain)


def _without_stride(tensors: Tensors, options: Options) -> Mapping[str, Any]:
    return {"stride": 1, "phase": 0}


ROW = Mechanism(
    name="strided_attention",
    summary="softmax attention to every stride-th key, and the query's own if asked",
    function=strided_attention,
    reference=reference,
    portable=portable,
    bound=bound,
    kernels=(Kernel("pointers", softmax.COMPILED, _pointers, softmax.LAUNCHES, softmax.too_wide),),
    inputs=softmax.inputs(),
    options={"stride": "int", "phase": "int", "include_self": "bool", "causal": "str", "scale": "float", "dropout_p": "float"},
    outputs=softmax.OUTPUTS,
    more="return_lse",
    work=_work,
    cases=(
        case("strided", 2, 2, 2, 40, 40, 16, 16, stride=3),
        case("cross", 1, 4, 2, 17, 75, 24, 16, stride=4, phase=3),
        case("own key", 1, 2, 1, 37, 37, 16, 16, stride=5, phase=2, include_self=True),
        case("causal", 1, 2, 2, 40, 40, 16, 16, stride=2, phase=1, causal=True),
        case("causal, own key", 2, 2, 1, 40, 40, 16, 16, stride=7, phase=3, include_self=True, causal=True),
        case("causal, fewer queries", 1, 2, 1, 18, 70, 16, 16, stride=3, phase=2, causal="bottom_right"),
        case("causal, fewer keys", 1, 2, 1, 35, 18, 16, 16, stride=1, causal="bottom_right"),
        case("stride of a tile and more", 1, 2, 2, 33, 40, 16, 16, stride=33, phase=6),
        case("padded keys", 2, 2, 2, 36, 36, 16, 16, stride=2, include_self=True, key_padding_mask="random"),
        case("padded before the beginning", 1, 2, 1, 40, 80, 16, 16, stride=2, causal="bottom_right", key_padding_mask="prefix"),
        case("dropout", 1, 2, 1, 20, 20, 16, 16, stride=3, phase=1, include_self=True, dropout_p=0.2, causal="top_left"),
    ),
    probes=_probes,
    workloads={
        "cpu": (case("stride 4", 1, 12, 12, 8192, 8192, 64, 64, stride=4),),
        "cuda": (
            case("stride 4", 1, 12, 12, 8192, 8192, 64, 64, stride=4),
            case("stride 128", 1, 16, 16, 16384, 16384, 64, 64, stride=128),
        ),
    },
    peers={"torch SDPA over all keys": _sdpa_over_all_keys, "torch SDPA on a copy": _sdpa_on_a_copy},
    laws=softmax.PATTERN_LAWS,
    equal_lengths=lambda options: options.get("causal") is True or bool(options.get("include_self")),
    reduction=Reduction(_without_stride, attention),
)
