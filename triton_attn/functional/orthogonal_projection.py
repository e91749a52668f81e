"""Orthogonal random features of Performer attention."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from triton_attn import arguments


def orthogonal_projection(
    features: int,
    dim: int,
    scaling: int = 0,
    *,
    generator: torch.Generator | None = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """(features, dim) random rows, orthogonal within blocks of dim rows: features that err less than independent ones.

    Args:
        features: how many rows; 1 and more.
        dim: width of a head.
        scaling: 0: rows as long as those of a Gaussian matrix; 1: all of length sqrt(dim).
        generator: on the CPU; what draws. The same seed gives the same rows on every device.
        device, dtype: of the result.

    Raises:
        ArgumentError: an argument is wrong; the message names it and what is allowed.

    Source: Choromanski et al., "Rethinking Attention with Performers", 2021, section 2.4.
    """
    who: Any = SimpleNamespace(name="orthogonal_projection")
    drawn: dict[str, Any] = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    arguments.whole(who, "features", features, 1)
    arguments.whole(who, "dim", dim, 1)
    arguments.whole(who, "scaling", scaling, 0, 1)
    blocks = []
    for _ in range(-(-features // dim)):
        q, r = torch.linalg.qr(torch.randn(dim, dim, **drawn))
        blocks.append((q * r.diagonal().sign()).mT)  # the signs make it uniform
    rows = torch.cat(blocks)[:features]
    if scaling == 1:
        lengths = torch.full((features, 1), math.sqrt(dim), dtype=torch.float64, device="cpu")
    else:
        lengths = torch.randn(features, dim, **drawn).norm(dim=1, keepdim=True)
    return (rows * lengths).to(device=torch.get_default_device() if device is None else device, dtype=dtype or torch.get_default_dtype())
