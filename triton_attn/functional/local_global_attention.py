"""Local-global attention: the public call and its row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from triton_attn import arguments, operators
from triton_attn.functional import _softmax as softmax
from triton_attn.mechanism import Case, Code, Input, Kernel, Launch, Mechanism, Options, Reduction, Sizes, Tensors, Work
from triton_attn.portable.local_global_attention import local_global_attention as portable
from triton_attn.reference.attention import attention
from triton_attn.reference.local_global_attention import bound
from triton_attn.reference.local_global_attention import local_global_attention as reference


def local_global_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    global_key: Tensor | None = None,
    global_value: Tensor | None = None,
    global_tokens: int = 0,
    key_padding_mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Any:
    """Softmax self-attention to a window around each query and to a few global keys, in one softmax.

    out_i = sum_j dropout(softmax_j(scale <query_i, key_j>)) value_j over |i - j| <= window // 2 and the globals: either summary
    keys that are given, or the first tokens of the sequence, which then see everything themselves. Cost O(N (window + globals)).

    Args:
        query: (B, H, N, D), float16, bfloat16, float32 or float64. Any strides; no argument is ever copied for its layout.
        key: (B, Hk, N, D); Hk divides H, and query head h uses key head h // (H / Hk).
        value: (B, Hk, N, E). D and E of any size, powers of two or not; kernels serve up to 256.
        window: a query sees window // 2 keys on each side and its own; 0 and more. Of 2 N and more: dense attention.
        global_key: (B, Hk, G, D), keys that every query sees, whatever causal says: they have no position.
        global_value: (B, Hk, G, E), their values; given with global_key or not at all.
        global_tokens: that many first positions are seen by all queries and see all keys (with causal: the earlier ones); 0 and
            more; not together with global_key.
        key_padding_mask: (B, N) boolean, True = ignore. What lies there, NaN included, reaches neither output nor gradients.
        causal: False; True, "top_left" or "bottom_right", which are one: query i sees no key after itself.
        scale: multiplies the scores; D ** -0.5 if None.
        dropout_p: share of attention weights set to zero, as in `triton_attn.attention`.
        return_lse: also return the log-sum-exp.

    Returns:
        (B, H, N, E) in the inputs' dtype, contiguous; with return_lse also (B, H, N), natural logarithm, float32 (float64 for
        float64), differentiable. A query that sees no key gives 0, lse -inf and no gradient.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.
        Unsupported: use_backend("triton") was asked for and no kernel can serve the call.

    Source: LocalGlobalAttention of HierarchicalVLM, with one softmax in place of an average of two; Beltagy et al., "Longformer",
    2020, and Ainslie et al., "ETC", 2020, for global tokens.
    """
    tensors = {
        "query": query,
        "key": key,
        "value": value,
        "global_key": global_key,
        "global_value": global_value,
        "key_padding_mask": key_padding_mask,
        "seed": None,
    }
    sizes = softmax.check(ROW, tensors)
    arguments.whole(ROW, "window", window, 0)
    arguments.whole(ROW, "global_tokens", global_tokens, 0)
    if (global_key is None) != (global_value is None):
        missing = "global_key" if global_key is None else "global_value"
        raise arguments.ArgumentError(ROW.name, missing, "is None; allowed: both global_key and global_value, or neither")
    if global_key is not None and global_tokens:
        raise arguments.ArgumentError(ROW.name, "global_tokens", f"is {global_tokens}; allowed with global_key: 0")
    options = {"window": window, "global_tokens": global_tokens, **softmax.common_options(ROW, sizes, causal, scale, dropout_p)}
    return operators.run(ROW, tensors, options, return_lse)


def _pointers() -> Code:
    from triton_attn.kernels.local_global_attention import SPACES, local_global_attention, local_global_attention_backward, tile_key

    return Code(local_global_attention, local_global_attention_backward, SPACES, tile_key)


def _work(sizes: Sizes, options: Options, itemsize: int) -> Work:
    n, half, tokens = sizes["m"], options["window"] // 2, min(options.get("global_tokens", 0), sizes["m"])
    causal, summaries = bool(options.get("causal")), sizes.get("c", 0)
    pairs = 0
    for i in range(n):
        if i < tokens:
            pairs += i + 1 if causal else n
        else:
            pairs += min(i if causal else i + half, n - 1) - max(i - half, tokens) + 1 + tokens
    return softmax.work(sizes, itemsize, pairs + n * summaries, n + summaries)


def _sdpa_over_all_keys(query: Tensor, key: Tensor, value: Tensor, *, causal: bool | str = False, **other: Any) -> Tensor:
    """torch's dense call: what local-global attention stands in for. Not the same function."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=bool(causal), enable_gqa=query.shape[1] != key.shape[1])


def _case(name: str, b: int, h: int, g: int, m: int, d: int, e: int, summaries: int = 0, **options: Any) -> Case:
    sizes = {"b": b, "h": h, "g": g, "m": m, "d": d, "e": e}
    if summaries:
        sizes["c"] = summaries
        options.update(global_key="normal", global_value="normal")
    return Case(name, sizes, options)


def _probes(width: int, plain: bool) -> tuple[Case, ...]:
    if plain:
        shape: Options = {"window": 256}
        return (
            _case("tokens", 2, 8, 4, 1024, width, width, global_tokens=4, **shape),
            _case("summaries", 2, 8, 4, 1024, width, width, 8, **shape),
        )
    riders: Options = {"window": 250, "causal": True, "key_padding_mask": "random", "dropout_p": 0.1}
    return (
        _case("everything, tokens", 2, 8, 4, 1000, width - 4, width - 4, global_tokens=3, **riders),
        _case("everything, summaries", 2, 8, 4, 1000, width - 4, width - 4, 7, **riders),
    )


def _wide_window(tensors: Tensors, options: Options) -> Mapping[str, Any]:
    return {"window": 2 * tensors["query"].shape[2], "global_tokens": 0, "global_key": None, "global_value": None}


ROW = Mechanism(
    name="local_global_attention",
    summary="softmax attention to a window and to global keys: summaries, or the first tokens",
    function=local_global_attention,
    reference=reference,
    portable=portable,
    bound=bound,
    kernels=(
        Kernel(
            "pointers",
            softmax.COMPILED,
            _pointers,
            (*softmax.LAUNCHES[:2], Launch("backward_key", ("key", "value", "global_key", "global_value"))),
            softmax.too_wide,
        ),
    ),
    inputs=softmax.inputs(
        "m",
        global_key=Input("b g c d", differentiable=True, optional=True),
        global_value=Input("b g c e", differentiable=True, optional=True),
    ),
    options={"window": "int", "global_tokens": "int", "causal": "str", "scale": "float", "dropout_p": "float"},
    outputs=softmax.OUTPUTS,
    more="return_lse",
    work=_work,
    cases=(
        _case("window", 2, 2, 2, 47, 16, 16, window=8),
        _case("wide window", 1, 2, 1, 90, 24, 16, window=75),
        _case("a key on each side", 1, 2, 2, 35, 16, 16, window=2),
        _case("first tokens", 1, 4, 2, 45, 16, 16, window=10, global_tokens=3),
        _case("first tokens, a tile and more", 1, 2, 1, 40, 16, 16, window=6, global_tokens=19),
        _case("first tokens, wide window", 1, 1, 1, 52, 16, 16, window=92, global_tokens=16),
        _case("causal, first tokens, wide window", 1, 1, 1, 52, 16, 16, window=80, global_tokens=2, causal=True),
        _case("summaries", 2, 2, 1, 41, 16, 24, 5, window=12),
        _case("causal", 1, 2, 2, 60, 16, 16, window=40, causal=True),
        _case("causal, first tokens", 1, 2, 1, 41, 16, 16, window=14, global_tokens=2, causal=True),
        _case("padded keys", 2, 2, 2, 36, 16, 16, window=12, global_tokens=2, key_padding_mask="random"),
        _case("padded keys, summaries", 2, 2, 1, 36, 16, 16, 3, window=12, key_padding_mask="random"),
        _case("padded before the beginning", 1, 2, 1, 52, 16, 16, window=42, global_tokens=2, key_padding_mask="prefix"),
        _case("dropout", 1, 2, 1, 30, 16, 16, window=9, global_tokens=3, dropout_p=0.2),
        _case("dropout, wide window", 1, 2, 1, 52, 16, 16, window=80, dropout_p=0.2),
        _case("dropout, summaries", 1, 2, 1, 30, 16, 16, 3, window=9, dropout_p=0.2, causal="top_left"),
    ),
    probes=_probes,
    workloads={
        "cpu": (
            _case("window 256", 1, 8, 8, 2048, 64, 64, window=256),
            _case("window 64, 4 global tokens", 1, 12, 12, 8192, 64, 64, window=64, global_tokens=4),
        ),
        "cuda": (
            _case("window 512, 64 summaries, d128", 1, 16, 16, 16384, 128, 128, 64, window=512),
            _case("window 512, d128", 1, 16, 16, 16384, 128, 128, window=512),
            _case("window 128, d64", 1, 16, 16, 16384, 64, 64, window=128),
            _case("window 2048, one head", 1, 1, 1, 32768, 128, 128, window=2048),
        ),
    },
    peers={"torch SDPA over all keys": _sdpa_over_all_keys},
    laws=softmax.PATTERN_LAWS,
    reduction=Reduction(_wide_window, attention),
)
