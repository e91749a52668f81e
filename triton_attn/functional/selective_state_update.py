"""One step of the selective scan, in place on the state."""

from __future__ import annotations

import torch
from torch import Tensor

from triton_attn import arguments
from triton_attn.arguments import ArgumentError, ArgumentTypeError
from triton_attn.functional.selective_scan import selective_scan

_NAME = "selective_state_update"


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One step of `selective_scan`: the state becomes the next one in place, and the step's output is returned. O(B D N).

    state <- exp(Delta A) state + Delta x B,  y = <C, state> + D x,  out = y silu(z), Delta as in `selective_scan`.

    Args:
        state: (B, D, N), or (B, H, D, N) with heads; float32 or x's dtype. Overwritten.
        x: (B, D) or (B, H, D), float16, bfloat16, float32 or float64.
        dt: as x: the raw step size.
        A: (D, N) or (H, D, N).
        B: (B, N), or (B, G, N) where G divides the heads, or D where there are none.
        C: likewise.
        D: (D,) or (H, D): the skip.
        z: as x: the gate.
        dt_bias: as D.
        dt_softplus: whether step sizes pass through softplus.
        state_batch_indices: (B,) int32 or int64, which rows of a larger state the items have, no row twice; the others stay.

    Returns:
        As x. It has gradients, and the state gets a history; under torch.no_grad() memory stays constant.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.
        Unsupported: use_backend("triton") was asked for and no kernel can serve the call.

    Source: Gu and Dao, "Mamba", 2023. Arguments as in mamba_ssm.
    """
    for name, given in {"state": state, "x": x, "dt": dt, "A": A, "B": B, "C": C}.items():
        if not isinstance(given, Tensor):
            raise ArgumentTypeError(_NAME, name, f"is a {type(given).__name__}; allowed: torch.Tensor")
    if state.ndim not in (3, 4):
        raise ArgumentError(_NAME, "state", f"has shape {tuple(state.shape)}; allowed: (B, D, N) or (B, H, D, N)")
    rows, *channels, n = state.shape
    batch = rows
    if state_batch_indices is not None:
        batch = x.shape[0]
        arguments.indices(_Self, "state_batch_indices", state_batch_indices, batch)
        arguments.inside(_Self, "state_batch_indices", state_batch_indices, rows)
    of_channels, of_items = tuple(channels), (batch, *channels)
    for name, optional, shape in (
        ("x", x, of_items),
        ("dt", dt, of_items),
        ("A", A, (*of_channels, n)),
        ("D", D, of_channels),
        ("z", z, of_items),
        ("dt_bias", dt_bias, of_channels),
    ):
        if optional is not None and optional.shape != shape:
            raise ArgumentError(_NAME, name, f"has shape {tuple(optional.shape)}; allowed: {shape}")
    for name, each in (("dt", dt), ("B", B), ("C", C), ("z", z)):
        if each is not None and not torch.is_autocast_enabled(x.device.type) and each.dtype != x.dtype:
            raise ArgumentTypeError(_NAME, name, f"has dtype {each.dtype}, x has {x.dtype}; they must be equal")
    held = torch.promote_types(x.dtype, torch.float32)
    if state.dtype not in (held, x.dtype):
        raise ArgumentTypeError(_NAME, "state", f"has dtype {state.dtype}; allowed: {held}, {x.dtype}")
    before = state if state_batch_indices is None else state.index_select(0, state_batch_indices)
    started = before.clone() if state_batch_indices is None and torch.is_grad_enabled() else before  # autograd keeps it, and we write
    out, after = selective_scan(
        u=x.flatten(1)[..., None],
        delta=dt.flatten(1)[..., None],
        A=A.flatten(0, -2),
        B=_grouped("B", B, batch, channels[0], n)[..., None],
        C=_grouped("C", C, batch, channels[0], n)[..., None],
        D=None if D is None else D.flatten(),
        z=None if z is None else z.flatten(1)[..., None],
        delta_bias=None if dt_bias is None else dt_bias.flatten(),
        delta_softplus=dt_softplus,
        return_last_state=True,
        initial_state=started.flatten(1, -2),
    )
    after = after.view(before.shape).to(state.dtype)
    if state_batch_indices is None:
        state.copy_(after)
    else:
        state.index_copy_(0, state_batch_indices.long(), after)
    merged: Tensor = out[..., 0]
    return merged.view(x.shape)


def _grouped(name: str, x: Tensor, batch: int, divided: int, n: int) -> Tensor:
    """(B, N) or (B, G, N) -> (B, G, N)."""
    grouped = x[:, None] if x.ndim == 2 else x
    if grouped.ndim != 3 or grouped.shape[0] != batch or grouped.shape[2] != n:
        raise ArgumentError(_NAME, name, f"has shape {tuple(x.shape)}; allowed: ({batch}, {n}) or ({batch}, G, {n})")
    if grouped.shape[1] == 0 or divided % grouped.shape[1]:
        raise ArgumentError(_NAME, name, f"has {grouped.shape[1]} groups; allowed: a divisor of {divided}")
    return grouped


class _Self:
    """Who complains."""

    name = _NAME
