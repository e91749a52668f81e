"""Masks that say no more than "not the future"."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def is_causal(attn_mask: Tensor) -> bool:
    """Whether a mask hides exactly the keys after each query: boolean, or 0 and -inf.

    Looked at once for each tensor and version; a graph keeps what was seen when it was compiled, and has to ask again by itself.
    """
    if attn_mask.ndim != 2 or attn_mask.shape[0] != attn_mask.shape[1]:
        return False
    return _looks_causal(attn_mask)


def _looks_causal(mask: Tensor) -> bool:
    remembered = not mask.is_inference()  # such a tensor has no version
    known = getattr(mask, "_triton_attn_causal", None) if remembered else None
    if known is not None and known[0] == mask._version:
        return bool(known[1])
    found = bool(hides_the_future(mask))
    if remembered:
        mask._triton_attn_causal = (mask._version, found)  # type: ignore[attr-defined]
    return found


def hides_the_future(mask: Tensor) -> Tensor:
    """The same as a tensor, with nothing waiting for it."""
    later = torch.ones(mask.shape, dtype=torch.bool, device=mask.device).triu(1)
    if mask.dtype == torch.bool:
        return (mask == later).all()
    return torch.where(later, mask == -math.inf, mask == 0).all()


# torch.compile evaluates it once, on the real mask
_looks_causal._dynamo_marked_constant = True  # type: ignore[attr-defined]
