"""Dilated attention: the public call and its row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from triton_attn import arguments, operators
from triton_attn.functional import _softmax as softmax
from triton_attn.mechanism import Case, Code, Kernel, Mechanism, Options, Reduction, Sizes, Tensors, Work
from triton_attn.portable.dilated_attention import dilated_attention as portable
from triton_attn.reference.attention import attention
from triton_attn.reference.dilated_attention import bound, offset_of
from triton_attn.reference.dilated_attention import dilated_attention as reference

RIDERS: Options = {"causal": True, "key_padding_mask": "random", "dropout_p": 0.1}
LONGEST = 2**31 - 1  # tokens, and programs of a launch
MODES, RULES, OVERLAPS = ("longnet", "head_group"), ("block", "mod"), ("count", "unique")


def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    mode: str = "longnet",
    offset_rule: str = "block",
    overlap: str = "count",
    detach_mixing: bool = False,
    key_padding_mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Any:
    """Softmax self-attention in branches: in branch b every r_b-th token of a segment of w_b tokens sees the others of them.

    Branches are mixed by their log-sum-exps, which is one softmax: out_i = sum_j dropout(softmax_j(scale <query_i, key_j> + log m_ij))
    value_j, where m_ij is the number of branches in which i and j are in one segment and both selected. Gradients go through the
    mixing. Cost O(N sum_b w_b / r_b^2).

    Args:
        query: (B, H, N, D), float16, bfloat16, float32 or float64. Any strides; kernels never copy an argument for its layout.
        key: (B, Hk, N, D); Hk divides H, and query head h uses key head h // (H / Hk).
        value: (B, Hk, N, E). D and E of any size, powers of two or not; kernels serve up to 256.
        segment_lengths: w of each branch, 1 and more, any numbers in any order. The last segment is short where N ends.
        dilation_rates: r of each branch, 1 and more; from w on it selects one token of a segment.
        mode: "longnet": every head takes part in every branch. "head_group": heads in contiguous groups, the first ones larger by
            one, each in one branch, with phase b mod r_b.
        offset_rule: which tokens of a segment head h selects: those at phase o, o + r, ... With "block" o = h // ceil(H / r), with
            "mod" o = h mod r.
        overlap: "count": a key that several branches share counts once for each; "unique": once.
        detach_mixing: torchscale's gradient, which takes the branches' weights in the mixture for constants: for going on with what was
            trained so. The output is the same. The backward pass computes each branch's output again, so that none is kept.
        key_padding_mask: (B, N) boolean, True = ignore. What lies there, NaN included, reaches neither output nor gradients.
        causal: False; True, "top_left" or "bottom_right", which are one: query i sees no key after itself.
        scale: multiplies the scores; D ** -0.5 if None.
        dropout_p: share of attention weights set to zero, as in `triton_attn.attention`; a pair falls in all of its branches.
        return_lse: also return the log-sum-exp.

    Returns:
        (B, H, N, E) in the inputs' dtype, contiguous; with return_lse also (B, H, N), natural logarithm, float32 (float64 for
        float64), differentiable. A query that no branch selects gives 0, lse -inf and no gradient.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.
        Unsupported: use_backend("triton") was asked for and no kernel can serve the call.

    Source: Ding et al., "LongNet: Scaling Transformers to 1,000,000,000 Tokens", 2023; offsets "block" as in torchscale, whose mixing
    has no gradient and whose short segments see padding; "head_group" as in dilated-attention-pytorch.
    """
    tensors = {"query": query, "key": key, "value": value, "key_padding_mask": key_padding_mask, "seed": None}
    sizes = softmax.check(ROW, tensors)
    lengths, rates = (
        arguments.whole_numbers(ROW, name, given)
        for name, given in (("segment_lengths", segment_lengths), ("dilation_rates", dilation_rates))
    )
    if len(lengths) != len(rates):
        raise arguments.ArgumentError(ROW.name, "dilation_rates", f"has {len(rates)} numbers; allowed: {len(lengths)}, as segment_lengths")
    lengths, rates = _bounded(lengths, rates, sizes["h"])
    # a head's only branch is not mixed
    detached = arguments.flag(ROW, "detach_mixing", detach_mixing) and mode == "longnet" and len(lengths) > 1
    if detached and overlap == "unique":
        raise arguments.ArgumentError(ROW.name, "overlap", "is 'unique' beside detach_mixing; allowed: 'count', as branches are apart")
    options = {
        "segment_lengths": lengths,
        "dilation_rates": rates,
        "mode": arguments.choice(ROW, "mode", mode, MODES),
        "offset_rule": arguments.choice(ROW, "offset_rule", offset_rule, RULES),
        "overlap": arguments.choice(ROW, "overlap", overlap, OVERLAPS),
        "detach_mixing": detached,
        **softmax.common_options(ROW, sizes, causal, scale, dropout_p),
    }
    return operators.run(ROW, tensors, options, return_lse)


def _bounded(lengths: list[int], rates: list[int], heads: int) -> tuple[list[int], list[int]]:
    """The same branches in numbers that every loop and every machine integer bears: no sequence has more tokens, and a rate beyond the
    segment, the heads and the branches selects what this bound selects.
    """
    lengths = [min(length, LONGEST) for length in lengths]
    pairs = zip(lengths, rates, strict=True)
    return lengths, [rate if rate <= length else min(rate, max(length, heads, len(rates))) for length, rate in pairs]


def _refused(tensors: Tensors, options: Options) -> list[str]:
    """Each class of rows modulo the least common multiple of the rates takes a program of each head."""
    classes, query = math.lcm(*options["dilation_rates"]), tensors["query"]
    found = softmax.too_wide(tensors, options)
    if query is not None and classes * query.shape[1] > LONGEST:
        found.append(f"dilation_rates have the least common multiple {classes}; kernels serve up to {LONGEST // query.shape[1]}")
    return found


def _pointers() -> Code:
    from triton_attn.kernels.dilated_attention import SPACES, dilated_attention, dilated_attention_backward, tile_key

    return Code(dilated_attention, dilated_attention_backward, SPACES, tile_key)


def _work(sizes: Sizes, options: Options, itemsize: int) -> Work:
    """Pairs that several branches share are counted in each: to leave one out costs as much as to compute it."""
    h, n = sizes["h"], sizes["m"]
    lengths, rates = options["segment_lengths"], options["dilation_rates"]
    pairs = 0
    for head in range(h):
        for branch, (length, rate) in enumerate(zip(lengths, rates, strict=True)):
            mode, rule = options.get("mode", "longnet"), options.get("offset_rule", "block")
            offset = offset_of(branch, head, h, len(lengths), rate, mode, rule)
            for size in () if offset is None else (min(length, n),) * (n // length) + (n % length,):
                rows = len(range(offset or 0, size, rate))
                pairs += rows * (rows + 1) // 2 if options.get("causal") else rows * rows
    return softmax.work({**sizes, "h": 1 if h else 0}, itemsize, pairs, n)


def _sdpa_over_all_keys(query: Tensor, key: Tensor, value: Tensor, *, causal: bool | str = False, **other: Any) -> Tensor:
    """torch's dense call: what dilated attention stands in for. Not the same function."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=bool(causal), enable_gqa=query.shape[1] != key.shape[1])


def _case(
    name: str, b: int, h: int, g: int, m: int, d: int, e: int, lengths: tuple[int, ...], rates: tuple[int, ...], **options: Any
) -> Case:
    return Case(name, {"b": b, "h": h, "g": g, "m": m, "d": d, "e": e}, {"segment_lengths": lengths, "dilation_rates": rates, **options})


def _probes(width: int, plain: bool) -> tuple[Case, ...]:
    if plain:
        return (_case("two branches", 2, 8, 8, 4096, width, width, (1024, 4096), (1, 4), causal=True),)
    return (_case("everything", 2, 8, 4, 1000, width - 4, width - 4, (96, 300), (1, 3), overlap="unique", **RIDERS),)


def _one_segment(tensors: Tensors, options: Options) -> Mapping[str, Any]:
    return {"segment_lengths": (max(tensors["query"].shape[2], 1),), "dilation_rates": (1,)}


ROW = Mechanism(
    name="dilated_attention",
    summary="softmax attention in dilated segments (LongNet), branches mixed in one softmax",
    function=dilated_attention,
    reference=reference,
    portable=portable,
    bound=bound,
    kernels=(Kernel("pointers", softmax.COMPILED, _pointers, softmax.LAUNCHES, _refused),),
    inputs=softmax.inputs("m"),
    options={
        "segment_lengths": "int[]",
        "dilation_rates": "int[]",
        "mode": "str",
        "offset_rule": "str",
        "overlap": "str",
        "detach_mixing": "bool",
        "causal": "str",
        "scale": "float",
        "dropout_p": "float",
    },
    outputs=softmax.OUTPUTS,
    more="return_lse",
    work=_work,
    cases=(
        _case("one branch", 1, 2, 2, 45, 16, 16, (20,), (3,)),
        _case("nested branches", 1, 3, 3, 64, 16, 16, (32, 64), (1, 2)),
        _case("short tail", 2, 1, 1, 37, 24, 16, (16, 32), (1, 2)),
        _case("segments that do not nest", 1, 2, 2, 30, 16, 16, (12, 20), (2, 1)),
        _case("grouped heads", 1, 4, 2, 30, 16, 16, (30, 15), (1, 2)),
        _case("offsets modulo the rate", 1, 3, 3, 36, 16, 16, (36, 18), (2, 1), offset_rule="mod"),
        _case("head groups", 1, 10, 10, 24, 16, 16, (12, 24, 24, 8), (1, 1, 2, 2), mode="head_group"),
        _case("each key once", 1, 4, 2, 34, 16, 16, (17, 34), (1, 2), overlap="unique"),
        _case("causal", 1, 3, 3, 50, 16, 16, (25, 50), (1, 3), causal=True),
        _case("classes of several tiles", 1, 1, 1, 70, 16, 16, (35,), (2,), causal=True),
        _case("causal, each key once", 1, 2, 2, 40, 16, 16, (40, 20), (2, 1), causal=True, overlap="unique"),
        _case("causal, grouped heads", 1, 2, 1, 36, 16, 16, (36, 9), (1, 2), causal=True),
        _case("each key once, coarse first", 1, 2, 1, 12, 16, 16, (12, 3, 6), (2, 1, 1), overlap="unique"),
        _case("each key once, classes in the middle", 1, 1, 1, 12, 16, 16, (12, 6, 6), (2, 2, 1), overlap="unique"),
        _case("padded keys", 2, 2, 2, 36, 16, 16, (18, 36), (1, 2), key_padding_mask="random"),
        _case("padded before the beginning", 1, 1, 1, 48, 16, 16, (48, 24), (1, 2), key_padding_mask="prefix"),
        _case("dropout", 1, 2, 1, 24, 16, 16, (12, 24), (1, 2), dropout_p=0.2),
        _case("detached mixing", 1, 3, 3, 30, 16, 16, (12, 15, 30), (1, 2, 3), detach_mixing=True),
        _case("detached mixing with everything", 1, 2, 1, 18, 16, 16, (9, 18), (1, 2), detach_mixing=True, **RIDERS),
    ),
    probes=_probes,
    workloads={
        "cpu": (_case("12 times fewer pairs", 1, 8, 8, 16384, 64, 64, (1024, 4096, 16384), (1, 4, 16)),),
        "cuda": (
            _case("16k, three branches", 1, 16, 16, 16384, 64, 64, (2048, 8192, 16384), (1, 4, 8)),
            _case("16k, a branch for each third of the heads", 1, 16, 16, 16384, 64, 64, (2048, 8192, 16384), (1, 4, 8), mode="head_group"),
            _case("32k, five branches", 1, 16, 16, 32768, 64, 64, (2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12)),
        ),
    },
    peers={"torch SDPA over all keys": _sdpa_over_all_keys},
    laws=softmax.PATTERN_LAWS,
    reduction=Reduction(_one_segment, attention),
    exact_pairs=False,
)
