"""Which keys each query sees, read off a row's own definition."""

from __future__ import annotations

import torch
from torch import Tensor

from triton_attn.mechanism import Case, Mechanism
from triton_attn.testing import inputs


def seen(row: Mechanism, case: Case) -> Tensor:
    """Boolean (B, H, M, N), keys from elsewhere after the others. With equal scores and values that are the identity, an output is
    positive where a key is seen."""
    tensors, options = inputs.draw(row, case)
    tensors["query"] = torch.zeros_like(tensors["query"])  # type: ignore[arg-type]
    values = [name for name, given in row.inputs.items() if given.axes.endswith(" e") and tensors[name] is not None]
    shapes = [inputs.shape(row.inputs[name].axes, case.sizes) for name in values]
    every = torch.eye(sum(length for _, _, length, _ in shapes))
    for name, (b, g, length, _) in zip(values, shapes, strict=True):
        tensors[name], every = every[:length].expand(b, g, length, -1), every[length:]
    out: Tensor = row.reference(**tensors, **options)
    return out > 0
