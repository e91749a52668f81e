"""LayerNorm of a weighted sum by its definition, and its bound."""

from __future__ import annotations

import torch
from torch import Tensor


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    alpha: float = 1.0,
    eps: float = 1e-5,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """h = alpha residual + x; (h - mean h) / sqrt(var h + eps) weight + bias, in float32 at least. Without a residual no sum is kept."""
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    if residual is not None:
        h = h + alpha * residual.to(h.dtype)
    centred = h - h.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    if weight is not None:
        y = y * weight.to(h.dtype)
    if bias is not None:
        y = y + bias.to(h.dtype)
    out = y.to(x.dtype)
    return (out, x[:0] if residual is None else h.to(x.dtype)) if return_sum else out


def bound(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    grad_out: Tensor,
    grad_sum: Tensor | None = None,
    alpha: float = 1.0,
    eps: float = 1e-5,
) -> dict[str, Tensor]:
    """S of the componentwise bound |error| <= K u S, by first-order error analysis; e_x is the error of x in units of u.

    Higham, "Accuracy and Stability of Numerical Algorithms", sections 3.1 and 3.3. float64 in, float64 out.
    """
    weighted = torch.zeros_like(x) if residual is None else alpha * residual
    h = weighted + x
    e_h = weighted.abs() + h.abs()
    c = h - _mean(h)
    e_c = e_h + _mean(e_h + h.abs()) + c.abs()
    square = _mean(c.square()) + eps
    rstd = square.rsqrt()
    e_rstd = rstd.pow(3) * (_mean(c.abs() * e_c) + square) + 2 * rstd
    y = c * rstd
    e_y = rstd * e_c + c.abs() * e_rstd + y.abs()
    w = torch.ones_like(x[0, 0] if x.numel() else x.new_empty(x.shape[-1])) if weight is None else weight
    s_out = w.abs() * (e_y + 2 * y.abs()) + (0 if bias is None else bias.abs())

    g = grad_out * w
    mean, slope = _mean(g), _mean(g * y)
    e_mean, e_slope = 2 * _mean(g.abs()), _mean(g.abs() * e_y + 3 * (g * y).abs())
    inner = g - mean - y * slope
    e_inner = 3 * g.abs() + e_mean + 2 * mean.abs() + e_y * slope.abs() + y.abs() * (e_slope + 2 * slope.abs())
    s_h = rstd * e_inner + inner.abs() * e_rstd + (inner * rstd).abs()
    if residual is not None and grad_sum is not None:
        s_h = s_h + grad_sum.abs() + (inner * rstd + grad_sum).abs()
    return {
        "out": s_out,
        "sum": e_h[:0] if residual is None else e_h,
        "x": s_h,
        "residual": abs(alpha) * s_h,
        "weight": (grad_out.abs() * (e_y + 2 * y.abs())).sum((0, 1)),
        "bias": 2 * grad_out.abs().sum((0, 1)),
    }


def _mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)
