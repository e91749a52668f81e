"""NVIDIA's libdevice, which Triton does not interpret: its common functions by torch's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice as portable
from triton.language.extra.cuda import libdevice as cuda
from triton.runtime import interpreter as plain

from triton_attn.testing.interpreter.faults import StrictnessError

MODULES = (portable, cuda)
_SAME = (
    *(
        "acos",
        "acosh",
        "asin",
        "asinh",
        "atan",
        "atan2",
        "atanh",
        "ceil",
        "copysign",
        "cos",
        "cosh",
        "erf",
        "erfc",
        "erfinv",
        "exp",
        "exp2",
    ),
    *("expm1", "floor", "fmod", "hypot", "ldexp", "lgamma", "log", "log10", "log1p", "log2", "pow", "rsqrt", "sin", "sinh", "sqrt", "tan"),
    *("tanh", "trunc"),
)
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    **{name: getattr(torch, name) for name in _SAME},
    # faster and less exact on a GPU
    **{f"fast_{name}f": getattr(torch, name) for name in ("cos", "exp", "log", "log10", "log2", "pow", "sin", "tan", "tanh")},
    **{f"{name}_rn": getattr(torch, name) for name in ("add", "div", "mul", "rsqrt", "sqrt", "sub")},
    "abs": torch.abs,
    "cbrt": lambda x: x.sign() * x.abs() ** (1 / 3),
    "fast_dividef": torch.div,
    "fdim": lambda x, y: torch.where(x > y, x - y, torch.zeros_like(x)),
    "fma": lambda x, y, z: (x.double() * y.double() + z.double()).to(x.dtype),
    "isinf": lambda x: torch.isinf(x).int(),
    "isnan": lambda x: torch.isnan(x).int(),
    "nearbyint": torch.round,
    "rcp_rn": torch.reciprocal,
    "rint": torch.round,
    "round": lambda x: torch.trunc(x + x.sign() * 0.5),  # halves away from zero
}


def named(function: Any) -> str | None:
    """The name of a libdevice function that a kernel's file holds; None of anything else."""
    modules = {module.__name__ for module in MODULES}
    return function.__name__ if getattr(function, "__module__", None) in modules and hasattr(function, "__name__") else None


def functions() -> Iterator[tuple[ModuleType, str]]:
    """(module, name) of every function of libdevice."""
    for module in MODULES:
        for name, value in vars(module).items():
            if named(value) == name:
                yield module, name


@functools.cache
def interpreted(name: str) -> Callable[..., Any]:
    """What takes its place."""

    def computed(*arguments: Any, **_: Any) -> Any:
        function = FUNCTIONS.get(name)
        if function is None:
            raise StrictnessError(f"libdevice.{name} is not interpreted; the interpreter knows {', '.join(sorted(FUNCTIONS))}")
        blocks = [plain.interpreter_semantic.to_tensor(argument) for argument in arguments]
        shape = np.broadcast_shapes(*(block.handle.data.shape for block in blocks))
        operands = [torch.from_numpy(np.array(np.broadcast_to(block.handle.data, shape))) for block in blocks]
        odd = [str(block.dtype.scalar) for block in blocks if block.dtype.scalar not in (tl.float32, tl.float64, tl.int32)]
        if odd or all(block.dtype.scalar == tl.int32 for block in blocks):
            raise TypeError(f"libdevice.{name} of {odd[0] if odd else 'int32'}: it takes float32 and float64")
        result = function(*operands).numpy()
        kind = tl.int32 if result.dtype == np.int32 else next(block.dtype.scalar for block in blocks if block.dtype.scalar != tl.int32)
        handle = plain.TensorHandle(result, kind)
        widest = max(blocks, key=lambda block: len(block.shape))
        return tl.tensor(handle, tl.block_type(kind, list(shape)) if widest.shape else kind)

    return computed
