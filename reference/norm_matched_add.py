"""A branch added at the length of what it is added to, by its definition, and its bound."""

from __future__ import annotations

import torch
from torch import Tensor


def norm_matched_add(
    x: Tensor, branch: Tensor, weight: Tensor | None = None, *, scale: float = 1.0, eps: float = 1e-6, return_gain: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """x + scale weight gain branch, gain = |x| / (|branch| + eps), in float32 at least. The norm of zeros has no gradient."""
    wide = torch.promote_types(x.dtype, torch.float32)
    ours, theirs = x.to(wide), branch.to(wide)
    gain = torch.linalg.vector_norm(ours, dim=-1) / (torch.linalg.vector_norm(theirs, dim=-1) + eps)
    factor = scale * gain if weight is None else scale * weight.to(wide) * gain
    out = (ours + factor[..., None] * theirs).to(x.dtype)
    return (out, gain) if return_gain else out


def bound(
    x: Tensor,
    branch: Tensor,
    weight: Tensor | None = None,
    *,
    grad_out: Tensor,
    grad_gain: Tensor | None = None,
    scale: float = 1.0,
    eps: float = 1e-6,
) -> dict[str, Tensor]:
    """S of the componentwise bound |error| <= K u S, by first-order error analysis. float64 in, float64 out.

    Norms have small relative errors, and so has the gain; what cancels is the product of gradient and branch.
    Higham, "Accuracy and Stability of Numerical Algorithms", sections 3.1 and 3.3.
    """
    own, other = _norm(x), _norm(branch)
    inverse = 1 / (other + eps)
    gain = own * inverse
    w = torch.as_tensor(scale, dtype=x.dtype, device=x.device) if weight is None else scale * weight
    added = w * gain * branch
    along, along_at_most = (grad_out * branch).sum(-1, keepdim=True), (grad_out * branch).abs().sum(-1, keepdim=True)
    to_gain = w * along
    e_gain = w.abs() * (along_at_most + 2 * along.abs())
    if grad_gain is not None:
        to_gain = to_gain + grad_gain[..., None]
        e_gain = e_gain + to_gain.abs()
    s_gain = e_gain + 6 * to_gain.abs()
    unit_x, unit_branch = _unit(x, own), _unit(branch, other)
    dx = grad_out + to_gain * inverse * unit_x
    first, second = w * gain * grad_out, to_gain * gain * inverse * unit_branch
    return {
        "out": 6 * added.abs() + (x + added).abs(),
        "gain": 5 * gain[..., 0],
        "x": s_gain * inverse * unit_x.abs() + dx.abs(),
        "branch": 6 * first.abs() + (s_gain + 4 * to_gain.abs()) * gain * inverse * unit_branch.abs() + (first - second).abs(),
        "weight": abs(scale) * (gain * (along_at_most + 6 * along.abs())).sum().reshape(1),
    }


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm


def _unit(x: Tensor, norm: Tensor) -> Tensor:
    return torch.where(norm > 0, x / norm.where(norm > 0, 1.0), 0.0)
