"""The short causal convolution of every channel by its definition, and its bound."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_attn.reference._sequences import same_sequence


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """y_t = bias + sum_i weight_i x_{t - (K - 1) + i}, steps before the first being the initial states or 0; silu(y) if asked."""
    wide = torch.promote_types(x.dtype, torch.float32)
    taps, steps = weight.shape[1], x.shape[2]
    before = x.new_zeros(*x.shape[:2], taps - 1, dtype=wide) if initial_states is None else initial_states.to(wide)
    history = torch.cat((before, x.to(wide)), 2)
    y = torch.zeros_like(x, dtype=wide)
    for i in range(taps):
        seen = history[:, :, i : i + steps]
        if seq_idx is not None:
            seen = torch.where(same_sequence(seq_idx, taps - 1 - i), seen, 0.0)
        y = y + weight[:, i, None].to(wide) * seen
    y = y if bias is None else y + bias[:, None].to(wide)
    out = (y if activation is None else F.silu(y)).to(x.dtype)
    return (out, history[:, :, steps:].to(x.dtype)) if return_final_states else out


def bound(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    grad_out: Tensor,
    grad_final_states: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> dict[str, Tensor]:
    """S of the componentwise bound |error| <= K u S: the same sums over magnitudes. float64 in, float64 out.

    Written small: e_x is the first-order error of x in units of u. Of silu'(y) it is |silu''(y)| e_y and its own roundings.
    """
    taps, steps = weight.shape[1], x.shape[2]
    before = x.new_zeros(*x.shape[:2], taps - 1) if initial_states is None else initial_states
    history = torch.cat((before, x), 2)
    everything = torch.ones_like(x[:, :1], dtype=torch.bool)
    visible = [everything if seq_idx is None else same_sequence(seq_idx, taps - 1 - i) for i in range(taps)]
    seen = [torch.where(visible[i], history[:, :, i : i + steps], 0.0) for i in range(taps)]
    products = [weight[:, i, None] * seen[i] for i in range(taps)]
    start = torch.zeros_like(x) if bias is None else bias[:, None].expand(x.shape)
    y = sum(products, start)
    e_y = sum((product.abs() for product in products), start.abs())
    p = y.sigmoid()
    if activation is None:
        e_out, slope, e_slope = e_y, torch.ones_like(y), torch.zeros_like(y)
    else:
        slope = p * (1 + y * (1 - p))
        e_out = slope.abs() * e_y + (y * p).abs() * (2 + y.abs() * (1 - p))
        bent = p * (1 - p) * (2 + y * (1 - 2 * p))
        e_slope = bent.abs() * e_y + p * (1 + y.abs() * (1 - p)) * (2 + y.abs())
    # what the gradient at y may err by, its own rounding included
    s = grad_out.abs() * (slope.abs() + e_slope)
    s_history = torch.zeros_like(history)
    for i in range(taps):
        s_history[:, :, i : i + steps] += torch.where(visible[i], weight[:, i, None].abs() * s, 0.0)
    if grad_final_states is not None:
        s_history[:, :, steps:] += grad_final_states.abs()
    return {
        "out": e_out,
        "final_states": history[:, :, steps:].abs(),
        "x": s_history[:, :, taps - 1 :],
        "weight": torch.stack([(s * seen[i].abs()).sum((0, 2)) for i in range(taps)], 1),
        "bias": s.sum((0, 2)),
        "initial_states": s_history[:, :, : taps - 1],
    }
