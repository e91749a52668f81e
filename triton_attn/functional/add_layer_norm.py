"""LayerNorm of a weighted sum: the public calls and their row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_attn import arguments, operators
from triton_attn.mechanism import Case, Code, Input, Kernel, Launch, Law, Mechanism, Options, Output, Sizes, Tensors, Work
from triton_attn.portable.add_layer_norm import add_layer_norm as portable
from triton_attn.reference.add_layer_norm import add_layer_norm as reference
from triton_attn.reference.add_layer_norm import bound

WIDEST = 4096  # of a kernel


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    alpha: float = 1.0,
    eps: float = 1e-5,
    return_sum: bool = False,
) -> Any:
    """LayerNorm(alpha * residual + x) in one pass: the end of a post-norm block, DeepNorm's with its alpha.

    h = alpha residual + x,  out = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias, over the last axis, in float32 inside.

    Args:
        x: (..., D), float16, bfloat16, float32 or float64. Any strides.
        residual: as x; None: 0, plain LayerNorm.
        weight: (D,), float32 or x's dtype; None: 1.
        bias: (D,), float32 or x's dtype; None: 0.
        alpha: multiplies the residual.
        eps: added to the variance; 0 and more.
        return_sum: also return h; without a residual that is x itself.

    Returns:
        As x, contiguous; with return_sum also h, as x.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.
        Unsupported: use_backend("triton") was asked for and no kernel can serve the call.

    Source: Ba et al., "Layer Normalization", 2016; Wang et al., "DeepNet: Scaling Transformers to 1,000 Layers", 2022, for alpha.
    """
    shape = x.shape if isinstance(x, Tensor) and not x.is_nested else None
    if shape is not None and isinstance(residual, Tensor) and not residual.is_nested and residual.shape != shape:
        raise arguments.ArgumentError(ROW.name, "residual", f"has shape {tuple(residual.shape)}; allowed: x's, {tuple(shape)}")
    tensors: dict[str, Any] = {"x": _rows(x), "residual": _rows(residual), "weight": weight, "bias": bias}
    sizes = arguments.check(ROW, tensors)
    options = {"alpha": arguments.finite(ROW, "alpha", alpha), "eps": arguments.finite(ROW, "eps", eps)}
    if eps < 0:
        raise arguments.ArgumentError(ROW.name, "eps", f"is {eps}; allowed: 0 and more")
    arguments.within(ROW, "x", "width", sizes["d"], 1, 2**31)
    outputs = operators.run(ROW, tensors, options, return_sum)
    if not return_sum:
        return outputs.view(shape)
    return outputs[0].view(shape), x if residual is None else outputs[1].view(shape)


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last axis: `add_layer_norm` without a residual, whose arguments, errors and source are the same."""
    out: Tensor = add_layer_norm(x, None, weight, bias, eps=eps)
    return out


def _rows(x: Any) -> Any:
    """(..., D) as (B, L, D); what is no such tensor as it is."""
    if not isinstance(x, Tensor) or x.is_nested or x.layout is not torch.strided or x.ndim in (0, 3):
        return x
    return x[None] if x.ndim == 2 else x[None, None] if x.ndim == 1 else x.flatten(0, -3)


def _kept(sizes: Sizes, options: Options) -> Sizes:
    """Without a residual the sum is x, and not written again."""
    return {"r": sizes["b"] if options.get("residual") is not None else 0}


def _narrow(tensors: Tensors, options: Options) -> list[str]:
    width = tensors["x"].shape[-1]
    return [f"x is {width} wide; rows up to {WIDEST} fit into registers"] if width > WIDEST else []


def _code() -> Code:
    from triton_attn.kernels._norm_rows import tile_key
    from triton_attn.kernels.add_layer_norm import SPACES, add_layer_norm, add_layer_norm_backward

    return Code(add_layer_norm, add_layer_norm_backward, SPACES, tile_key)


def _work(sizes: Sizes, options: Options, itemsize: int) -> Work:
    """No matrix products; a multiply-add each for the sum, the variance and the affine end. x and residual read, output and sum written."""
    b, length, d = (sizes[axis] for axis in "bld")
    passes = 2 if options.get("residual") is None else 4
    return Work(flops=6.0 * b * length * d, bytes=float(itemsize * b * length * d * passes + 4 * 2 * d))


def _composed(
    x: Tensor, residual: Tensor | None = None, weight: Any = None, bias: Any = None, *, alpha: float = 1.0, eps: float = 1e-5
) -> Tensor:
    h = x if residual is None else alpha * residual + x
    return F.layer_norm(h, h.shape[-1:], weight, bias, eps)


def _case(name: str, b: int, length: int, d: int, **options: Any) -> Case:
    sizes = {"b": b, "l": length, "d": d}
    return Case(name, {**sizes, **_kept(sizes, options)}, options)


_POST: Options = {"residual": "normal", "weight": "normal", "bias": "normal"}
_PEERS: dict[str, Callable[..., Any]] = {"torch, two operators": _composed}

ROW = Mechanism(
    name="add_layer_norm",
    summary="LayerNorm of a weighted sum: residual, alpha and normalisation in one pass",
    function=add_layer_norm,
    reference=reference,
    portable=portable,
    bound=bound,
    kernels=(
        Kernel(
            "rows",
            ((8, 0), (9, 0)),
            _code,
            (Launch("forward"), Launch("backward", ("x", "residual", "weight", "bias"))),
            _narrow,
        ),
    ),
    inputs={
        "x": Input("b l d", differentiable=True),
        "residual": Input("b l d", differentiable=True, optional=True),
        "weight": Input("d", differentiable=True, optional=True, dtype="float32 or like inputs"),
        "bias": Input("d", differentiable=True, optional=True, dtype="float32 or like inputs"),
    },
    options={"alpha": "float", "eps": "float"},
    outputs={"out": Output("b l d"), "sum": Output("r l d")},
    more="return_sum",
    work=_work,
    cases=(
        _case("post-norm", 2, 17, 24, **_POST),
        _case("alpha", 2, 19, 33, alpha=2.2134, **_POST),
        _case("plain", 2, 17, 24, weight="normal", bias="normal"),
        _case("no parameters", 2, 9, 32, residual="normal"),
        _case("longer than a tile", 2, 150, 5, **_POST),
    ),
    probes=lambda width, plain: (_case("everything", 8, 256, width, alpha=2.2, **_POST), _case("plain", 8, 256, width)),
    workloads={
        "cpu": (_case("batch 8, 197 tokens, 768 wide", 8, 197, 768, **_POST),),
        "cuda": (
            _case("batch 64, 197 tokens, 768 wide", 64, 197, 768, **_POST),
            _case("batch 8, 4096 tokens, 1024 wide", 8, 4096, 1024, alpha=2.2134, **_POST),
        ),
    },
    peers=_PEERS,
    laws=(Law.BATCH_CHANGES_NOTHING,),
    derived=_kept,
    draws={"d": (1, 2, 3, 16, 17, 33), "l": (0, 1, 2, 7, 16, 17)},
)
