"""Feature maps of linear attention, in naive PyTorch: phi, its derivative, and how wide its result is."""

from __future__ import annotations

import torch
from torch import Tensor


def features(x: Tensor, feature_map: str) -> Tensor:
    """phi(x), on the last axis. "crelu" is [relu(x), relu(-x)], twice as wide."""
    if feature_map == "elu":
        # elu(x) + 1 without the cancellation
        found = x.clamp(max=0.0).exp_()
        return found + x.relu() if found.requires_grad else found.add_(x.relu())
    if feature_map == "relu":
        return x.relu()
    if feature_map == "crelu":
        return torch.cat((x, -x), -1).relu_()  # in place: fresh memory costs more
    return x


def count(width: int, feature_map: str) -> int:
    """How many features a vector of a width has."""
    return 2 * width if feature_map == "crelu" else width


def roundings(x: Tensor, feature_map: str) -> Tensor:
    """By how many units phi(x) may be off: one, and where it is an exponential also its argument's."""
    units = torch.ones_like(x) + (-x).clamp(min=0.0) if feature_map == "elu" else torch.ones_like(x)
    return torch.cat((units, units), -1) if feature_map == "crelu" else units


def pulled_back(grad: Tensor, x: Tensor, feature_map: str) -> Tensor:
    """What |d phi / dx| makes of a gradient's magnitude."""
    if feature_map == "elu":
        return grad * x.clamp(max=0.0).exp() * roundings(x, feature_map)
    if feature_map == "relu":
        return grad * (x > 0)
    if feature_map == "crelu":
        above, below = grad.chunk(2, -1)
        return above * (x > 0) + below * (x < 0)
    return grad
