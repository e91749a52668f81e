"""Who looks into a call, so that its operators must be out of place and differentiable, and how to differentiate such ones again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def watched(tensor: Tensor) -> bool:
    """Whether more than plain autograd looks at the call."""
    return (
        torch.compiler.is_compiling()
        or type(tensor) is not Tensor
        or tensor.device.type == "meta"
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
    )


def backward_is_watched(*grads: Tensor | None) -> bool:
    """Whether gradients are differentiated again, or several come at once, which cannot go into buffers."""
    functorch = torch._C._functorch
    mapped = (functorch.is_batchedtensor(x) or functorch.is_legacy_batchedtensor(x) for x in grads if x is not None)
    return torch.is_grad_enabled() or any(mapped)


def differentiable(
    function: Callable[..., Any], saved: Sequence[Any], needed: Sequence[bool], grads: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Gradients of function(*saved), as many outputs as grads, that can be differentiated again."""
    with torch.enable_grad():
        outputs = function(*saved)
        wanted = [x for x, need in zip(saved, needed, strict=True) if need]
        found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, materialize_grads=True))
    return tuple(next(found) if need else None for need in needed)
