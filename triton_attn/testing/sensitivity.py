"""How much error a definition forgives, measured: S of the bound for a reference that comes without one.

Monte Carlo arithmetic (Parker, 1997): the definition runs in float64 while every input and every intermediate result moves at random
by one unit up or down, forward and backward; S is how far its results move, per unit. A kernel that rounds each step once moves as far.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

STEP = 2.0**-20  # far above float64's roundoff, far below anything that bends
RUNS = 4


def sensitivity(
    call: Callable[..., Sequence[Tensor]], tensors: Mapping[str, Any], truth: Sequence[Tensor], *, seed: int = 0
) -> list[Tensor]:
    """S of each result of `call(**tensors)`, which gave `truth` in float64.

    |truth| + the largest of some random moves; and since an element may stand still by chance, at least their root mean square
    over its last axis.
    """
    moves = [torch.zeros_like(result) for result in truth]
    for run in range(RUNS):
        with _Moving(seed * RUNS + run) as moving:
            results = call(**{name: moving.moved(x.detach().clone()) if isinstance(x, Tensor) else x for name, x in tensors.items()})
        for i, result in enumerate(results):
            distance = ((result.detach() - truth[i]) / STEP).abs().nan_to_num(0.0, 0.0, 0.0)
            moves[i] = torch.maximum(moves[i], distance)
    sizes = []
    for result, move in zip(truth, moves, strict=True):
        least = move.square().mean(-1, keepdim=True).sqrt() if move.ndim and move.numel() else move
        sizes.append(result.abs() + torch.maximum(move, least.expand_as(move)))
    return sizes


@functools.cache
def _decompositions() -> Mapping[Any, Callable[..., Any]]:
    # gelu is core, and hides 1 + erf(x), which cancels
    gelu = torch._decomp.get_decompositions([torch.ops.aten.gelu, torch.ops.aten.gelu_backward])
    return {**gelu, **torch._decomp.core_aten_decompositions()}


class _Moving(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Moves every float64 result. Fused operations are taken apart first, so that what they hide moves too."""

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.generator = torch.Generator().manual_seed(seed)
        self.parts = _decompositions()

    def moved(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype != torch.float64:
            return x
        with torch.utils._python_dispatch._disable_current_modes():
            signs = torch.randint(2, x.shape, generator=self.generator) * 2 - 1
            return x * (1 + STEP * signs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.parts:
            with self:
                parts = self.parts[func](*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        result = func(*args, **kwargs)
        aliases = any(given.alias_info is not None for given in func._schema.returns)
        return result if aliases else tree_map(self.moved, result)
