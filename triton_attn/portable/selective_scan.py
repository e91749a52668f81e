"""The selective scan in stock PyTorch operators, in tiles of time: linear in time and memory.

Eagerly, `_scan_tiles` computes it and its gradients with explicit buffers. Where something looks into the call (torch.compile, torch.func,
forward mode, fake tensors, a second derivative), `_scan_doubling` does, whose operators are out of place and differentiable.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_attn.portable._scan_doubling import scanned
from triton_attn.portable._scan_tiles import Scan
from triton_attn.portable._watched import watched


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
    """(out, last_state); nothing is computed at masked steps."""
    dtype, wide = u.dtype, torch.promote_types(u.dtype, torch.float32)
    # cast once, or its gradients from scan and skip would each be rounded
    u = u.to(wide)
    if mask is not None:
        # ahead of the products: 0 * NaN is NaN
        dead = ~mask.expand(u.shape[0], u.shape[2])[:, None]
        u, delta = u.masked_fill(dead, 0.0), delta.masked_fill(dead, 0.0)
        B, C = B.masked_fill(dead[:, None], 0.0), C.masked_fill(dead[:, None], 0.0)
        z = None if z is None else z.masked_fill(dead, 0.0)
    size = delta.to(wide)
    if delta_bias is not None:
        size = size + delta_bias.to(wide)[:, None]
    if delta_softplus:
        size = F.softplus(size)
    if mask is not None:
        size = size.masked_fill(dead, 0.0)
    A = A.to(wide)
    tensors = (u, size, A, B, C)
    start = None if initial_state is None else initial_state.to(wide)
    # one step needs no buffers
    y, last = scanned(*tensors, start, cu_seqlens) if watched(u) or u.shape[2] == 1 else Scan.apply(*tensors, start, cu_seqlens)  # type: ignore[no-untyped-call]
    if D is not None:
        y = y + D.to(wide)[:, None] * u
    if z is not None:
        y = y * F.silu(z.to(wide))
    out = y.to(dtype)
    return (out, last) if return_last_state else out
