"""Attention within packed sequences: the public call and its row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_attn import arguments, operators
from triton_attn.functional import _softmax as softmax
from triton_attn.mechanism import Case, Code, Input, Kernel, Law, Mechanism, Options, Output, Sizes, Work
from triton_attn.portable.attention_varlen import attention_varlen as portable
from triton_attn.reference.attention_varlen import attention_varlen as reference
from triton_attn.reference.attention_varlen import bound


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Any:
    """Softmax attention within sequences of any lengths, packed one behind the other: no padding, one call.

    out_i = sum_j dropout(softmax_j(scale <query_i, key_j>)) value_j over the keys j of query i's own sequence. Where a sequence has
    Nq queries and Nk keys its i-th query stands at its (i + Nk - Nq)-th key: from there causality and window count. Cost: the sum of
    Nq Nk over the sequences; O(total window) with a window.

    Args:
        query: (total Nq, H, D), float16, bfloat16, float32 or float64. Any strides; no argument is ever copied for its layout.
        key: (total Nk, Hk, D); Hk divides H, and query head h uses key head h // (H / Hk).
        value: (total Nk, Hk, E).
        cu_seqlens_q: (S + 1,) int32 or int64: queries cu_seqlens_q[s] to cu_seqlens_q[s + 1] are of sequence s; from 0 to total Nq.
            On a CPU offsets that fall or end elsewhere raise; elsewhere, where looking would wait for the device, queries of no
            sequence give 0.
        cu_seqlens_k: likewise for keys.
        causal: no query sees a key after its own place; the same as a right window of 0.
        window_size: (left, right): keys up to so many places before and after the query's own are seen; -1: all of them.
        scale: multiplies the scores; D ** -0.5 if None.
        dropout_p: share of attention weights set to zero, as in `triton_attn.attention`.
        return_lse: also return the log-sum-exp.

    Returns:
        (total Nq, H, E) in the inputs' dtype; with return_lse also (H, total Nq), natural logarithm, float32 (float64 for float64),
        differentiable. A query that sees no key gives 0, lse -inf and no gradient.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.
        Unsupported: use_backend("triton") was asked for and no kernel can serve the call.

    Source: flash_attn_varlen_func of flash-attn, whose layout, offsets, alignment and windows these are.
    """
    tensors = {
        "query": query,
        "key": key,
        "value": value,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "seed": None,
    }
    sizes = softmax.check(ROW, tensors)
    for name, axis in (("cu_seqlens_q", "m"), ("cu_seqlens_k", "n")):
        given = tensors[name]
        if given is None:
            raise arguments.ArgumentTypeError(ROW.name, name, "is None; allowed: a tensor of int32 or int64")
        arguments.offsets(ROW, name, given, sizes[axis])
    arguments.within(ROW, "cu_seqlens_q", "length", sizes["p"], 1, 2**31)
    window = arguments.whole_numbers(ROW, "window_size", window_size, -1)
    if len(window) != 2:
        raise arguments.ArgumentError(ROW.name, "window_size", f"is {tuple(window)}; allowed: (left, right), each -1 or more")
    options = {
        "causal": arguments.flag(ROW, "causal", causal),
        "window_size": window,
        "scale": sizes["d"] ** -0.5 if scale is None else arguments.finite(ROW, "scale", scale),
        "dropout_p": arguments.probability(ROW, "dropout_p", dropout_p),
    }
    return operators.run(ROW, tensors, options, return_lse)


def _pointers() -> Code:
    from triton_attn.kernels.attention_varlen import SPACES, attention_varlen, attention_varlen_backward, tile_key

    return Code(attention_varlen, attention_varlen_backward, SPACES, tile_key)


def _work(sizes: Sizes, options: Options, itemsize: int) -> Work:
    """As if all sequences were of one length."""
    m, n, count = sizes["m"], sizes["n"], max(sizes["p"] - 1, 1)
    left, right = options.get("window_size", (-1, -1))
    right = 0 if options.get("causal") else right
    rows, keys = m / count, n / count
    seen = min(keys, (left if left >= 0 else keys) + (right if right >= 0 else keys) + 1)
    pairs = rows * keys / 2 if options.get("causal") and left < 0 else rows * seen
    return softmax.work({**sizes, "b": 1}, itemsize, int(count * pairs), n)


def _nested(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    **other: Any,
) -> Tensor:
    """torch's call for each sequence by itself: what people write who have no packed call."""
    if tuple(window_size) != (-1, -1):
        raise NotImplementedError("torch has no windows")
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outs = []
    for place in range(len(ends_q) - 1):
        rows, keys = slice(ends_q[place], ends_q[place + 1]), slice(ends_k[place], ends_k[place + 1])
        q, k, v = (x.transpose(0, 1)[None] for x in (query[rows], key[keys], value[keys]))
        outs.append(F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])[0].transpose(0, 1))
    return torch.cat(outs)


def _padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    **other: Any,
) -> Tensor:
    """torch's call on one batch, every sequence padded to the longest."""
    if tuple(window_size) != (-1, -1):
        raise NotImplementedError("torch has no windows")
    lengths_q, lengths_k = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    longest_q, longest_k = int(lengths_q.max()), int(lengths_k.max())

    def batch(x: Tensor, offsets: Tensor, longest: int) -> Tensor:
        index = (offsets[:-1, None] + torch.arange(longest, device=x.device)).clamp(max=max(x.shape[0] - 1, 0))
        return x[index].transpose(1, 2)

    mask = torch.arange(longest_k, device=key.device) < lengths_k[:, None]
    q, k, v = batch(query, cu_seqlens_q, longest_q), batch(key, cu_seqlens_k, longest_k), batch(value, cu_seqlens_k, longest_k)
    seen = mask[:, None, None, :]
    if causal:
        seen = seen & torch.ones(longest_q, longest_k, dtype=torch.bool, device=key.device).tril()
    out = F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=query.shape[1] != key.shape[1])
    return out.transpose(1, 2)[torch.arange(longest_q, device=query.device) < lengths_q[:, None]]


_GROWING: Options = {"cu_seqlens_q": "growing", "cu_seqlens_k": "growing"}


def case(name: str, count: int, h: int, g: int, m: int, n: int, d: int, e: int, **options: Any) -> Case:
    """A call of some packed sequences."""
    sizes = {"m": m, "n": n, "h": h, "g": g, "d": d, "e": e, "p": count + 1}
    same = {"cu_seqlens_q": "drawn", "cu_seqlens_k": "drawn"}
    return Case(name, sizes, {**same, **options})


def _probes(width: int, plain: bool) -> tuple[Case, ...]:
    if plain:
        return (case("packed", 5, 8, 4, 1024, 1024, width, width, causal=True),)
    return (case("everything", 5, 8, 4, 1000, 1000, width - 4, width - 4, dropout_p=0.1, window_size=(100, 50)),)


ROW = Mechanism(
    name="attention_varlen",
    summary="softmax attention within packed sequences of any lengths, causal or windowed",
    function=attention_varlen,
    reference=reference,
    portable=portable,
    bound=bound,
    kernels=(Kernel("pointers", softmax.COMPILED, _pointers, softmax.LAUNCHES, softmax.too_wide),),
    inputs={
        "query": Input("m h d", differentiable=True),
        "key": Input("n g d", differentiable=True),
        "value": Input("n g e", differentiable=True),
        "cu_seqlens_q": Input("p", kind="offsets", into="m"),
        "cu_seqlens_k": Input("p", kind="offsets", into="n"),
        "seed": Input("", kind="seed"),
    },
    options={"causal": "bool", "window_size": "int[]", "scale": "float", "dropout_p": "float"},
    outputs={"out": Output("m h e"), "lse": Output("h m", "float32")},
    more="return_lse",
    work=_work,
    cases=(
        case("packed", 3, 2, 2, 40, 40, 16, 16),
        case("one sequence", 1, 2, 1, 33, 33, 24, 16),
        case("causal", 4, 4, 2, 45, 50, 16, 24, causal=True),
        case("window", 2, 2, 2, 44, 44, 16, 16, window_size=(5, 3)),
        case("causal window", 3, 2, 1, 40, 47, 16, 16, causal=True, window_size=(6, -1)),
        case("looking ahead", 2, 2, 2, 30, 41, 16, 16, window_size=(-1, 4)),
        case("many short", 12, 2, 2, 25, 25, 16, 16, causal=True),
        case("dropout", 2, 2, 1, 20, 22, 16, 16, dropout_p=0.2),
    ),
    probes=_probes,
    workloads={
        "cpu": (case("8 sequences, causal", 8, 8, 8, 4096, 4096, 64, 64, causal=True, **_GROWING),),
        "cuda": (
            case("16 sequences, causal", 16, 16, 16, 16384, 16384, 128, 128, causal=True, **_GROWING),
            case("256 windows of a vision tower", 256, 16, 16, 16384, 16384, 80, 80, **_GROWING),
            case("4 sequences, window", 4, 16, 16, 65536, 65536, 64, 64, causal=True, window_size=(512, -1), **_GROWING),
        ),
    },
    peers={"torch SDPA, one by one": _nested, "torch SDPA, padded": _padded},
    laws=(Law.ROWS_SUM_TO_ONE,),
    exact_pairs=False,
    equal_lengths=lambda options: False,
    draws={"p": (1, 2, 3, 5)},
)
