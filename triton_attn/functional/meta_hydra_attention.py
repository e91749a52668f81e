"""Hydra attention with a head for each feature: its public call and its row."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_attn import arguments, operators
from triton_attn.arguments import ArgumentError
from triton_attn.mechanism import Case, Code, Input, Kernel, Launch, Law, Mechanism, Options, Output, Sizes, Tensors, Work
from triton_attn.portable.meta_hydra_attention import meta_hydra_attention as portable
from triton_attn.reference.meta_hydra_attention import bound
from triton_attn.reference.meta_hydra_attention import meta_hydra_attention as reference

WIDEST = 256  # of a kernel


def meta_hydra_attention(
    query_branches: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    return_state: bool = False,
) -> Any:
    """Hydra attention with as many heads as features, of R branches of queries to the same keys and values.

    out_ri = u(q_ri) * sum_j u(k_j) * v_j, elementwise, with u(x) = x / |x|, and u(0) = 0: scores are cosines of single features, which
    nothing normalizes. The sum is computed once, whatever R is, in float32: O((1 + R) N D).

    Args:
        query_branches: (B, R, H, N, D), float16, bfloat16, float32 or float64. u is taken over D; for the paper's one vector of a token
            H is 1.
        key: (B, H, M, D).
        value: (B, H, M, D).
        causal: query i sees keys 0..i; N must be M.
        key_padding_mask: (B, M) boolean, True = ignore.
        return_state: also return the sum over all keys.

    Returns:
        (B, R, H, N, D) in the inputs' dtype, contiguous; with return_state also the sum, (B, H, D), float32 (float64 for float64). Zeros
        stay zeros and get no gradient; a vector is one where |x|^2 is 0 in float32.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.
        Unsupported: use_backend("triton") was asked for and no kernel can serve the call.

    Source: Bolya et al., "Hydra Attention: Efficient Attention with Many Heads", 2022; the "meta" variant of Linear-ViT.
    """
    tensors = {"query_branches": query_branches, "key": key, "value": value, "key_padding_mask": key_padding_mask}
    options = {"causal": arguments.flag(ROW, "causal", causal)}
    sizes = arguments.check(ROW, tensors)
    if causal and sizes["m"] != sizes["n"]:
        raise ArgumentError(ROW.name, "causal", f"is True with {sizes['m']} queries and {sizes['n']} keys; allowed: as many of each")
    arguments.at_least(ROW, "query_branches", "width", sizes["d"], 1)
    return operators.run(ROW, tensors, options, arguments.flag(ROW, "return_state", return_state))


def _pointers() -> Code:
    from triton_attn.kernels.meta_hydra_attention import SPACES, meta_hydra_attention, meta_hydra_attention_backward, tile_key

    return Code(meta_hydra_attention, meta_hydra_attention_backward, SPACES, tile_key)


def _wide(tensors: Tensors, options: Options) -> list[str]:
    width = tensors["query_branches"].shape[-1]
    return [f"query_branches is {width} wide; heads up to {WIDEST} fit into registers"] if width > WIDEST else []


def _work(sizes: Sizes, options: Options, itemsize: int) -> Work:
    """No matrix products: a multiply-add for each number that is summed, and one for each that is asked for."""
    b, r, h, m, n, d = (sizes[axis] for axis in "brhmnd")
    return Work(flops=2.0 * b * h * d * (n + r * m), bytes=float(itemsize * b * h * d * 2 * (n + r * m) + 4 * b * h * d))


def _separate(
    query_branches: Tensor, key: Tensor, value: Tensor, *, causal: bool = False, key_padding_mask: Tensor | None = None
) -> Tensor:
    """Each branch by the paper's own lines, in the inputs' dtype."""
    if causal or key_padding_mask is not None:
        raise NotImplementedError("sees all keys")
    branches = []
    for query in query_branches.unbind(1):
        q, k = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        branches.append(q * (k * value).sum(-2, keepdim=True))
    return torch.stack(branches, 1)


def _case(name: str, *sizes: int, **options: Any) -> Case:
    return Case(name, dict(zip("brhmnd", sizes, strict=True)), options)


_RIDERS: Options = {"causal": True, "key_padding_mask": "random"}

ROW = Mechanism(
    name="meta_hydra_attention",
    summary="attention by cosines of single features, which costs a running sum, of several branches of queries",
    function=meta_hydra_attention,
    reference=reference,
    portable=portable,
    bound=bound,
    kernels=(
        Kernel(
            "pointers",
            ((8, 0), (9, 0)),
            _pointers,
            (Launch("forward"), Launch("backward_query", ("query_branches",)), Launch("backward_key", ("key", "value"))),
            _wide,
        ),
    ),
    inputs={
        "query_branches": Input("b r h m d", differentiable=True),
        "key": Input("b h n d", differentiable=True),
        "value": Input("b h n d", differentiable=True),
        "key_padding_mask": Input("b n", kind="padding"),
    },
    options={"causal": "bool"},
    outputs={"out": Output("b r h m d"), "state": Output("b h d", "float32")},
    more="return_state",
    work=_work,
    cases=(
        _case("whole", 2, 3, 1, 20, 33, 16),
        _case("causal", 2, 2, 2, 32, 32, 20, causal=True),
        _case("causal, several spans", 1, 2, 2, 530, 530, 4, causal=True),
        _case("padded keys", 2, 2, 2, 20, 33, 12, key_padding_mask="random"),
        _case("padded keys, causal", 2, 2, 1, 33, 33, 16, **_RIDERS),
    ),
    probes=lambda width, plain: (_case("everything", 1, 2, 4, 8000, 8000, width - 4, **_RIDERS),),
    workloads={
        "cpu": (_case("4 branches, whole 4k", 1, 4, 8, 4096, 4096, 64),),
        "cuda": (
            _case("one branch, whole 4k", 8, 1, 16, 4096, 4096, 64),
            _case("one branch, causal 4k", 8, 1, 16, 4096, 4096, 64, causal=True),
            _case("4 branches, whole 16k", 2, 4, 16, 16384, 16384, 64),
            _case("4 branches, causal 8k", 1, 4, 16, 8192, 8192, 64, causal=True),
        ),
    },
    peers={"separate hydras": _separate},
    laws=(
        Law.FUTURE_CHANGES_NOTHING,
        Law.PADDING_CHANGES_NOTHING,
        Law.KEY_ORDER_CHANGES_NOTHING,
        Law.BATCH_CHANGES_NOTHING,
        Law.BRANCH_ORDER_CHANGES_NOTHING,
    ),
    backward_share=2.0,
    draws={"r": (1, 2, 3)},
)
