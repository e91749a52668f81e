"""Hydra attention: branches of queries over one state of keys and values, its public call and its row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triton_attn import arguments, operators
from triton_attn.arguments import ArgumentError, ArgumentTypeError
from triton_attn.functional.linear_attention import FEATURE_MAPS
from triton_attn.functional.linear_attention import ROW as LINEAR
from triton_attn.functional.meta_hydra_attention import meta_hydra_attention
from triton_attn.mechanism import Case, Code, Input, Kernel, Launch, Law, Mechanism, Options, Output, Sizes, Tensors, Work
from triton_attn.portable.hydra_attention import hydra_attention as portable
from triton_attn.reference._features import count
from triton_attn.reference.hydra_attention import bound
from triton_attn.reference.hydra_attention import hydra_attention as reference

VARIANTS = ("branches", "meta")


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
    variant: str = "branches",
) -> Any:
    """Linear attention of R branches of queries to the same keys and values.

    "branches": out_ri = phi(q_ri)^T S / (<phi(q_ri), z> + eps / scale), with S = sum_j phi(k_j) v_j^T and z = sum_j phi(k_j) of a head
    computed once, whatever R is: O(N D E (1 + R)) in place of O(2 R N D E).
    "meta": out_ri = u(q_ri) * sum_j u(k_j) * v_j, elementwise, with u(x) = x / |x|: as many heads as features, no denominator, O(N D).

    Args:
        query_branches: (B, R, H, N, D), float16, bfloat16, float32 or float64.
        key: (B, H, M, D).
        value: (B, H, M, E); E = D for "meta".
        feature_map: phi of "branches", as in `triton_attn.linear_attention`.
        causal: query i sees keys 0..i; N must be M.
        scale: multiplies the scores of "branches", which only weighs them against eps; 1 if None.
        eps: added to the sum of the scores of "branches"; 0 and more. With 0, a query whose scores are all 0, or that sees no key,
            gives NaN, 0 / 0.
        key_padding_mask: (B, M) boolean, True = ignore.
        return_state: also return (S, z) of "branches" after the last key, which `triton_attn.linear_attention` could go on from; the sum
            of "meta".
        variant: "branches" or "meta".

    Returns:
        (B, R, H, N, E) in the inputs' dtype, contiguous; with return_state also (S, z): (B, H, F, E) and (B, H, F),
        float32 (float64 for float64). "meta" as `triton_attn.meta_hydra_attention` has it.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.
        Unsupported: use_backend("triton") was asked for and no kernel can serve the call.

    Source: HydraAttention of Linear-ViT, with one state in place of one for each branch; "meta" is Bolya et al., "Hydra Attention:
    Efficient Attention with Many Heads", 2022.
    """
    arguments.choice(ROW, "variant", variant, VARIANTS)
    options: dict[str, Any] = {
        "feature_map": arguments.choice(ROW, "feature_map", feature_map, FEATURE_MAPS),
        "causal": arguments.flag(ROW, "causal", causal),
        "scale": 1.0 if scale is None else arguments.finite(ROW, "scale", scale),
        "eps": arguments.finite(ROW, "eps", eps),
    }
    if options["eps"] < 0:
        raise ArgumentError(ROW.name, "eps", f"is {eps}; allowed: 0 and more")
    arguments.flag(ROW, "return_state", return_state)
    if variant == "meta":
        return meta_hydra_attention(query_branches, key, value, causal=causal, key_padding_mask=key_padding_mask, return_state=return_state)
    if not isinstance(query_branches, Tensor):
        raise ArgumentTypeError(ROW.name, "query_branches", f"is a {type(query_branches).__name__}; allowed: torch.Tensor")
    if query_branches.ndim != 5:
        raise ArgumentError(ROW.name, "query_branches", f"has shape {tuple(query_branches.shape)}; allowed: 5 axes, 'b r h n d'")
    if not isinstance(key, Tensor) or key.ndim != 4 or key.shape[1] != query_branches.shape[2]:
        found = tuple(key.shape) if isinstance(key, Tensor) else type(key).__name__
        raise ArgumentError(ROW.name, "key", f"has shape {found}; allowed: 'b h m d' with h = {query_branches.shape[2]}")
    tensors: dict[str, Tensor | None] = {
        "query_branches": query_branches,
        "key": key,
        "value": value,
        "key_padding_mask": key_padding_mask,
    }
    sizes = arguments.check(ROW, tensors, _fit)
    if causal and sizes["m"] != sizes["n"]:
        raise ArgumentError(ROW.name, "causal", f"is True with {sizes['m']} queries and {sizes['n']} keys; allowed: as many of each")
    out = operators.run(ROW, tensors, options, return_state)
    return (out[0], (out[1], out[2])) if return_state else out


def _fit(row: Mechanism, sizes: Sizes) -> None:
    arguments.at_least(row, "query_branches", "width", sizes["d"], 1)
    arguments.at_least(row, "value", "width", sizes["e"], 1)


def _pointers() -> Code:
    from triton_attn.kernels.hydra_attention import SPACES, hydra_attention, hydra_attention_backward, tile_key

    return Code(hydra_attention, hydra_attention_backward, SPACES, tile_key)


def _refuses(tensors: Tensors, options: Options) -> list[str]:
    """What linear attention's kernel refuses, and a key: the stride of branches costs registers."""
    query, value, padded_keys = tensors["query_branches"], tensors["value"], tensors.get("key_padding_mask")
    named, options = {"query": query, "value": value, "key_padding_mask": padded_keys}, {"feature_map": "crelu", **options}
    reasons = LINEAR.kernels[-1].refuses(named, options)
    exact = query.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    if not reasons and exact and padded_keys is not None and max(count(query.shape[-1], options["feature_map"]), value.shape[-1]) > 32:
        reasons = [
            f"query_branches has dtype {query.dtype}; exact float32 with key_padding_mask goes up to 32 columns of features or values"
        ]
    return reasons


def _work(sizes: Sizes, options: Options, itemsize: int) -> Work:
    b, r, h, m, n, d, e = (sizes[axis] for axis in "brhmnde")
    feature_map = options.get("feature_map", "crelu")
    moved = itemsize * b * h * (r * m + n) * (d + e) + 4 * b * h * count(d, feature_map) * (e + 1)
    exponentials = b * h * (r * m + n) * d if feature_map == "elu" else 0
    return Work(flops=2.0 * b * h * count(d, feature_map) * e * (r * m + n), bytes=float(moved), exponentials=float(exponentials))


def _separate(query_branches: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Each branch by a linear attention of its own, as the original does it."""
    options.setdefault("feature_map", "crelu")
    return torch.stack([LINEAR.function(query, key, value, **options) for query in query_branches.unbind(1)], 1)


def _case(name: str, *sizes: int, **options: Any) -> Case:
    named = dict(zip("brhmnde", sizes, strict=True))
    return Case(name, {**named, "f": count(named["d"], options.get("feature_map", "crelu"))}, options)


def _probes(width: int, plain: bool) -> tuple[Case, ...]:
    # long enough for more than one span, with any tile
    if plain:
        return (_case("causal", 1, 2, 2, 8192, 8192, width, width, causal=True, feature_map="elu"),)
    riders: Options = {"causal": True, "key_padding_mask": "random"}
    return (
        _case("everything", 1, 2, 4, 8000, 8000, width - 4, width - 4, feature_map="elu", **riders),
        _case("everything, two signs", 1, 2, 4, 8000, 8000, width // 2 - 4, width - 4, **riders),
    )


ROW = Mechanism(
    name="hydra_attention",
    summary="linear attention of several branches of queries to keys and values that are summed once",
    function=hydra_attention,
    reference=reference,
    portable=portable,
    bound=bound,
    kernels=(
        Kernel(
            "pointers",
            ((8, 0), (9, 0)),
            _pointers,
            (Launch("forward"), Launch("backward_query", ("query_branches",)), Launch("backward_key", ("key", "value"))),
            _refuses,
        ),
    ),
    inputs={
        "query_branches": Input("b r h m d", differentiable=True),
        "key": Input("b h n d", differentiable=True),
        "value": Input("b h n e", differentiable=True),
        "key_padding_mask": Input("b n", kind="padding"),
    },
    options={"feature_map": "str", "causal": "bool", "scale": "float", "eps": "float"},
    outputs={"out": Output("b r h m e"), "state": Output("b h f e", "float32"), "normalizer": Output("b h f", "float32")},
    more="return_state",
    work=_work,
    cases=(
        _case("whole", 2, 3, 2, 20, 33, 16, 24),
        _case("causal", 2, 2, 2, 40, 40, 16, 24, causal=True, feature_map="elu"),
        _case("causal, several spans", 2, 2, 1, 85, 85, 8, 16, causal=True, scale=0.5, feature_map="elu"),
        _case("padded keys", 2, 2, 2, 20, 33, 12, 16, key_padding_mask="random"),
        _case("padded keys, causal", 2, 2, 1, 33, 33, 16, 16, key_padding_mask="random", causal=True),
    ),
    probes=_probes,
    workloads={
        "cpu": (_case("4 branches, whole 4k", 1, 4, 8, 4096, 4096, 64, 64),),
        "cuda": (
            _case("4 branches, whole 16k", 2, 4, 16, 16384, 16384, 64, 64),
            _case("4 branches, causal 8k", 1, 4, 16, 8192, 8192, 64, 64, causal=True),
        ),
    },
    peers={"separate linear attentions": _separate},
    laws=(
        Law.ROWS_SUM_TO_ONE,
        Law.FUTURE_CHANGES_NOTHING,
        Law.PADDING_CHANGES_NOTHING,
        Law.KEY_ORDER_CHANGES_NOTHING,
        Law.BATCH_CHANGES_NOTHING,
        Law.BRANCH_ORDER_CHANGES_NOTHING,
    ),
    derived=lambda sizes, options: {"f": count(sizes["d"], options.get("feature_map", "crelu"))},
    backward_share=2.0,
    draws={"r": (1, 2, 3)},
    public=("variant",),
)
