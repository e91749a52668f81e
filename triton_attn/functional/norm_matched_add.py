"""A branch added at the length of what it is added to: the public call and its row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from triton_attn import arguments, operators
from triton_attn.mechanism import Case, Code, Input, Kernel, Launch, Law, Mechanism, Options, Output, Sizes, Tensors, Work
from triton_attn.portable.norm_matched_add import norm_matched_add as portable
from triton_attn.reference.norm_matched_add import bound
from triton_attn.reference.norm_matched_add import norm_matched_add as reference

WIDEST = 4096  # of a kernel


def norm_matched_add(
    x: Tensor,
    branch: Tensor,
    weight: Tensor | None = None,
    *,
    scale: float = 1.0,
    eps: float = 1e-6,
    return_gain: bool = False,
) -> Any:
    """x + scale * weight * |x| / (|branch| + eps) * branch: a branch as long as x, whatever its own length.

    Norms over the last axis, in float32 inside. A row of zeros gets no gradient through its norm.

    Args:
        x: (..., D), float16, bfloat16, float32 or float64. Any strides.
        branch: as x.
        weight: one element, float32 or x's dtype, which may be learned; None: 1.
        scale: multiplies the weight; where it is a number, the weight itself.
        eps: added to the branch's norm; more than 0.
        return_gain: also return |x| / (|branch| + eps).

    Returns:
        As x, contiguous; with return_gain also (...), float32 (float64 for float64).

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.
        Unsupported: use_backend("triton") was asked for and no kernel can serve the call.

    Source: AdaptedCLIPWithCrossAttention of an AA-CLIP fork.
    """
    shape = x.shape if isinstance(x, Tensor) and not x.is_nested else None
    if shape is not None and isinstance(branch, Tensor) and not branch.is_nested and branch.shape != shape:
        raise arguments.ArgumentError(ROW.name, "branch", f"has shape {tuple(branch.shape)}; allowed: x's, {tuple(shape)}")
    factor = arguments.finite(ROW, "scale", scale)
    if isinstance(weight, Tensor):
        if weight.numel() != 1:
            raise arguments.ArgumentError(ROW.name, "weight", f"has shape {tuple(weight.shape)}; allowed: one element")
        weight = weight.reshape(1)
    tensors: dict[str, Any] = {"x": _rows(x), "branch": _rows(branch), "weight": weight}
    sizes = arguments.check(ROW, tensors)
    options = {"scale": factor, "eps": arguments.finite(ROW, "eps", eps)}
    if eps <= 0:
        raise arguments.ArgumentError(ROW.name, "eps", f"is {eps}; allowed: more than 0")
    arguments.within(ROW, "x", "width", sizes["d"], 1, 2**31)
    outputs = operators.run(ROW, tensors, options, return_gain)
    if not return_gain:
        return outputs.view(shape)
    return outputs[0].view(shape), outputs[1].view(x.shape[:-1])


def _rows(x: Any) -> Any:
    """(..., D) as (B, L, D); what is no such tensor as it is."""
    if not isinstance(x, Tensor) or x.is_nested or x.layout is not torch.strided or x.ndim in (0, 3):
        return x
    return x[None] if x.ndim == 2 else x[None, None] if x.ndim == 1 else x.flatten(0, -3)


def _narrow(tensors: Tensors, options: Options) -> list[str]:
    width = tensors["x"].shape[-1]
    return [f"x is {width} wide; rows up to {WIDEST} fit into registers"] if width > WIDEST else []


def _code() -> Code:
    from triton_attn.kernels._norm_rows import tile_key
    from triton_attn.kernels.norm_matched_add import SPACES, norm_matched_add, norm_matched_add_backward

    return Code(norm_matched_add, norm_matched_add_backward, SPACES, tile_key)


def _work(sizes: Sizes, options: Options, itemsize: int) -> Work:
    """No matrix products; a multiply-add for each norm and the sum. x and branch read, output and gains written."""
    b, length, d = (sizes[axis] for axis in "bld")
    return Work(flops=6.0 * b * length * d, bytes=float(itemsize * b * length * d * 3 + 4 * b * length))


def _composed(x: Tensor, branch: Tensor, weight: Any = None, *, scale: float = 1.0, eps: float = 1e-6) -> Tensor:
    gain = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / (torch.linalg.vector_norm(branch, dim=-1, keepdim=True) + eps)
    out: Tensor = x + scale * (1.0 if weight is None else weight) * branch * gain
    return out


def _case(name: str, b: int, length: int, d: int, **options: Any) -> Case:
    return Case(name, {"b": b, "l": length, "d": d, "w": 1}, {"scale": 1.0, "eps": 1e-6, **options})


_PEERS: dict[str, Callable[..., Any]] = {"torch, operator by operator": _composed}

ROW = Mechanism(
    name="norm_matched_add",
    summary="a branch added at the length of what it is added to, times a weight",
    function=norm_matched_add,
    reference=reference,
    portable=portable,
    bound=bound,
    kernels=(Kernel("rows", ((8, 0), (9, 0)), _code, (Launch("forward"), Launch("backward", ("x", "branch", "weight"))), _narrow),),
    inputs={
        "x": Input("b l d", differentiable=True),
        "branch": Input("b l d", differentiable=True),
        "weight": Input("w", differentiable=True, optional=True, dtype="float32 or like inputs"),
    },
    options={"scale": "float", "eps": "float"},
    outputs={"out": Output("b l d"), "gain": Output("b l", dtype="float32")},
    more="return_gain",
    work=_work,
    cases=(
        _case("a tenth", 2, 17, 24, scale=0.1),
        _case("learned", 2, 19, 33, weight="normal"),
        _case("learned, scaled, large eps", 2, 9, 32, weight="normal", scale=0.5, eps=0.25),
        _case("longer than a tile", 2, 150, 5, weight="normal"),
    ),
    probes=lambda width, plain: (_case("everything", 8, 256, width, weight="normal"), _case("plain", 8, 256, width)),
    workloads={
        "cpu": (_case("AA-CLIP's text, 16 prompts, 77 tokens", 16, 77, 768, scale=0.1),),
        "cuda": (
            _case("AA-CLIP's text, 256 prompts, 77 tokens", 256, 77, 768, scale=0.1),
            _case("AA-CLIP's image, batch 16, 1370 tokens", 16, 1370, 1024, weight="normal"),
        ),
    },
    peers=_PEERS,
    laws=(Law.BATCH_CHANGES_NOTHING,),
    derived=lambda sizes, options: {"w": 1},
    draws={"d": (1, 2, 3, 16, 17, 33), "l": (0, 1, 2, 7, 16, 17)},
)
