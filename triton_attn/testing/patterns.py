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
    batched = all(len(size) == 4 for size in shapes)  # else (length, heads, width)
    every = torch.eye(sum(size[-2 if batched else 0] for size in shapes))
    for name, size in zip(values, shapes, strict=True):
        length = size[-2 if batched else 0]
        here, every = every[:length], every[length:]
        tensors[name] = here.expand(*size[:-1], -1) if batched else here[:, None].expand(*size[:-1], -1)
    out: Tensor = row.reference(**tensors, **options)
    return out > 0 if batched else out.transpose(0, 1)[None] > 0
