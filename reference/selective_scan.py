"""The selective scan by its definition, a loop over time in naive PyTorch, and its bound."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

UNDERFLOW = 2.0**-102  # a decay below float32's least normal number, 2^-126, may be taken for 0; u is 2^-24


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """h_t = exp(Delta_t A) h_{t-1} + Delta_t u_t B_t; y_t = <C_t, h_t> + D u_t; y_t silu(z_t). States are at least float32."""
    wide = torch.promote_types(u.dtype, torch.float32)
    B, C = (per_channel(x, u.shape[1]) for x in (B, C))
    outs, states = [], []
    for s, (item, steps) in enumerate(sequences(u, cu_seqlens)):
        h = A.new_zeros(A.shape, dtype=wide) if initial_state is None else initial_state[s].to(wide)
        ys = []
        for t in steps:
            if mask is not None and not mask[item, t]:
                ys.append(torch.zeros_like(h[:, 0], dtype=u.dtype))
                continue
            now = u[item, :, t].to(wide)
            size = delta[item, :, t].to(wide)
            if delta_bias is not None:
                size = size + delta_bias.to(wide)
            if delta_softplus:
                size = F.softplus(size)
            h = torch.exp(size[:, None] * A.to(wide)) * h + (size * now)[:, None] * B[item, :, :, t].to(wide)
            y = (h * C[item, :, :, t].to(wide)).sum(-1)
            if D is not None:
                y = y + D.to(wide) * now
            if z is not None:
                y = y * F.silu(z[item, :, t].to(wide))
            ys.append(y.to(u.dtype))
        outs.append(torch.stack(ys, -1) if ys else u[item, :, :0])
        states.append(h)
    rows = outs if cu_seqlens is None else [torch.cat([*outs, u[0, :, :0]], -1)]
    out = torch.stack(rows) if rows else u.clone()
    last = torch.stack(states) if states else A.new_zeros(0, *A.shape, dtype=wide)
    return (out, last) if return_last_state else out


def sequences(u: Tensor, cu_seqlens: Tensor | None) -> list[tuple[int, range]]:
    """(batch index, steps) of every sequence."""
    if cu_seqlens is None:
        return [(item, range(u.shape[2])) for item in range(u.shape[0])]
    ends = cu_seqlens.tolist()
    return [(0, range(start, end)) for start, end in pairwise(ends)]


def per_channel(x: Tensor, channels: int) -> Tensor:
    """(B, G, N, L) -> (B, D, N, L)."""
    return x.repeat_interleave(channels // x.shape[1] if x.shape[1] else 1, 1)


def bound(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    grad_out: Tensor,
    grad_last_state: Tensor | None = None,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> dict[str, Tensor]:
    """S of the componentwise bound |error| <= K u S, by the recurrence itself.

    Written small: e_x is the first-order error of x in units of u. An error of Delta A moves its exponential by as much relatively;
    a step inherits the state's error through the decay and adds its own roundings (Higham, "Accuracy and Stability of Numerical
    Algorithms", sections 3.1 and 3.3). Sums are taken over magnitudes. float64 in, float64 out.
    """
    groups = B.shape[1]
    wide_b, wide_c = (per_channel(x, u.shape[1]) for x in (B, C))
    raw = delta if delta_bias is None else delta + delta_bias[:, None]
    e_raw = delta.abs() if delta_bias is None else delta.abs() + delta_bias.abs()[:, None]
    size, slope = (F.softplus(raw), raw.sigmoid()) if delta_softplus else (raw, torch.ones_like(raw))
    e_size = slope * e_raw + size.abs()
    gate, dgate, e_gate, e_dgate = _gate(z, u)
    live = torch.ones_like(raw[:, 0], dtype=torch.bool) if mask is None else mask.expand(raw[:, 0].shape)
    zero = torch.zeros_like(u)
    s = {name: zero.clone() for name in ("out", "u", "delta", "z")}
    s_b, s_c = torch.zeros_like(wide_b), torch.zeros_like(wide_c)
    s_a, s_d, s_bias = torch.zeros_like(A), u.new_zeros(u.shape[1]), u.new_zeros(u.shape[1])
    last, first = [], []
    skip = u.new_zeros(u.shape[1]) if D is None else D
    for number, (item, steps) in enumerate(sequences(u, cu_seqlens)):
        h = torch.zeros_like(A) if initial_state is None else initial_state[number]
        e_h = h.abs()
        kept = []
        for t in (t for t in steps if live[item, t]):
            dt, now, b = size[item, :, t, None], u[item, :, t, None], wide_b[item, :, :, t]
            decay = (dt * A).exp()
            # in units of u, how far the decay errs: the product's own rounding, Delta's error, the exponential's, underflow
            e_decay = decay * (1 + (dt * A).abs() + e_size[item, :, t, None] * A.abs()) + UNDERFLOW
            faded, e_faded = decay * h, decay * e_h + e_decay * h.abs()
            added, e_added = dt * now * b, (now * b).abs() * (e_size[item, :, t, None] + dt.abs())
            h, e_h = faded + added, e_faded + e_added + (faded + added).abs()
            y = (h * wide_c[item, :, :, t]).sum(-1) + skip * now[:, 0]
            e_y = ((e_h + h.abs()) * wide_c[item, :, :, t].abs()).sum(-1) + (skip * now[:, 0]).abs()
            s["out"][item, :, t] = e_y * gate[item, :, t].abs() + y.abs() * e_gate[item, :, t]
            kept.append((t, decay, e_decay, faded, e_faded, h, e_h, y, e_y))
        last.append(e_h)
        dh = torch.zeros_like(A) if grad_last_state is None else grad_last_state[number]
        e_dh = dh.abs()
        for t, decay, e_decay, faded, e_faded, h, e_h, y, e_y in reversed(kept):
            dt, now, b, c = size[item, :, t], u[item, :, t], wide_b[item, :, :, t], wide_c[item, :, :, t]
            grad = grad_out[item, :, t]
            s["z"][item, :, t] = grad.abs() * (e_y * dgate[item, :, t].abs() + y.abs() * e_dgate[item, :, t])
            dy, e_dy = grad * gate[item, :, t], grad.abs() * e_gate[item, :, t]
            dh = dh + dy[:, None] * c
            e_dh = e_dh + (e_dy + dy.abs())[:, None] * c.abs() + dh.abs()
            x, e_x = dh * faded, e_dh * faded.abs() + dh.abs() * e_faded
            through, e_through = (dh * b).sum(-1), ((e_dh + dh.abs()) * b.abs()).sum(-1)
            e_dsize = now.abs() * e_through + ((e_x + x.abs()) * A.abs()).sum(-1)
            dsize = now * through + (A * x).sum(-1)
            s["u"][item, :, t] = (skip * dy).abs() + skip.abs() * e_dy + dt.abs() * e_through + e_size[item, :, t] * through.abs()
            e_slope = slope[item, :, t] * (1 + e_raw[item, :, t]) if delta_softplus else zero[item, :, t]
            s["delta"][item, :, t] = slope[item, :, t] * e_dsize + dsize.abs() * e_slope
            s_b[item, :, :, t] = (e_dh + dh.abs()) * (dt * now).abs()[:, None] + dh.abs() * (e_size[item, :, t] * now.abs())[:, None]
            s_c[item, :, :, t] = dy.abs()[:, None] * (e_h + h.abs()) + e_dy[:, None] * h.abs()
            s_a += dt.abs()[:, None] * (e_x + x.abs()) + e_size[item, :, t, None] * x.abs()
            s_d += (e_dy + dy.abs()) * now.abs()
            s_bias += s["delta"][item, :, t] + (slope[item, :, t] * dsize).abs()
            dh, e_dh = decay * dh, decay * e_dh + e_decay * dh.abs()
        first.append(e_dh)
    states = [torch.stack(x) if x else A.new_zeros(0, *A.shape) for x in (last, first)]
    summed = [x.reshape(x.shape[0], groups, x.shape[1] // max(groups, 1), *x.shape[2:]).sum(2) for x in (s_b, s_c)]
    return {
        "out": s["out"],
        "last_state": states[0],
        "u": s["u"],
        "delta": s["delta"],
        "A": s_a,
        "B": summed[0],
        "C": summed[1],
        "D": s_d,
        "z": s["z"],
        "delta_bias": s_bias,
        "initial_state": states[1],
    }


def _gate(z: Tensor | None, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """silu(z), its derivative, and the errors of both in units of u."""
    if z is None:
        return torch.ones_like(u), torch.zeros_like(u), torch.ones_like(u), torch.zeros_like(u)
    p = z.sigmoid()
    gate, slope = z * p, p * (1 + z * (1 - p))
    return gate, slope, gate.abs() * (2 + z.abs() * (1 - p)), p * (1 + z.abs() * (1 - p)) * (2 + z.abs())
