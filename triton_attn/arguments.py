"""Arguments in, sizes out, or an error that names the argument, what came and what is allowed, before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from triton_attn.mechanism import Input, Mechanism

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CAUSAL = (False, True, "top_left", "bottom_right")


class ArgumentError(ValueError):
    """A wrong argument; `argument` is its name."""

    def __init__(self, function: str, argument: str, complaint: str) -> None:
        super().__init__(f"{function}: {argument} {complaint}")
        self.argument = argument


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument of a wrong type or dtype."""


def check(row: Mechanism, tensors: Mapping[str, torch.Tensor | None]) -> dict[str, int]:
    """Check every tensor of a call against its row; return the size of each axis letter."""
    sizes: dict[str, int] = {}
    first: tuple[str, torch.Tensor] | None = None
    for name, given in row.inputs.items():
        tensor = tensors[name]
        if given.kind != "values":
            continue
        _require_dense(row.name, name, tensor)
        assert tensor is not None
        if first is None:
            first = (name, tensor)
            if tensor.dtype not in FLOATS:
                raise ArgumentTypeError(row.name, name, f"has dtype {tensor.dtype}; allowed: {_listed(FLOATS)}")
        else:
            if tensor.dtype != first[1].dtype:
                raise ArgumentTypeError(row.name, name, f"has dtype {tensor.dtype}, {first[0]} has {first[1].dtype}; they must be equal")
            _same_device(row.name, name, tensor, first)
        _fit(row.name, name, given, tensor, sizes)
    for name, given in row.inputs.items():
        tensor = tensors[name]
        if tensor is None or given.kind == "values" or first is None:
            continue
        _require_dense(row.name, name, tensor)
        _same_device(row.name, name, tensor, first)
        if given.kind == "mask":
            _broadcastable(row.name, name, given, tensor, sizes)
            if tensor.dtype != torch.bool and tensor.dtype not in (first[1].dtype, torch.float32):
                wanted = _listed((torch.bool, first[1].dtype, torch.float32))
                raise ArgumentTypeError(row.name, name, f"has dtype {tensor.dtype}; allowed: {wanted} (boolean: True = attend)")
        elif given.kind == "padding":
            _fit(row.name, name, given, tensor, sizes)
            if tensor.dtype != torch.bool:
                raise ArgumentTypeError(row.name, name, f"has dtype {tensor.dtype}; allowed: torch.bool (True = ignore)")
    return sizes


def divides(row: Mechanism, sizes: Mapping[str, int], inner: tuple[str, str], outer: tuple[str, str]) -> None:
    """(axis, argument) twice: the first size must divide the second."""
    (small, argument), (large, other) = inner, outer
    if sizes[small] == 0 and sizes[large] == 0:
        return
    if sizes[small] == 0 or sizes[large] % sizes[small]:
        raise ArgumentError(row.name, argument, f"has {sizes[small]} heads, which do not divide {other}'s {sizes[large]}")


def within(row: Mechanism, argument: str, what: str, size: int, low: int, high: int) -> None:
    """A size inside its range."""
    if not low <= size <= high:
        raise ArgumentError(row.name, argument, f"has {what} {size}; allowed: {low} to {high}")


def probability(row: Mechanism, argument: str, given: float) -> float:
    """A number in [0, 1]; NaN is none."""
    if not 0.0 <= given <= 1.0:
        raise ArgumentError(row.name, argument, f"is {given}; allowed: 0 to 1")
    return float(given)


def finite(row: Mechanism, argument: str, given: float) -> float:
    """A number that is neither infinite nor NaN."""
    if not math.isfinite(given):
        raise ArgumentError(row.name, argument, f"is {given}; allowed: a finite number")
    return float(given)


def alignment(row: Mechanism, causal: bool | str, queries: int, keys: int) -> str:
    """Normalise `causal` to "", "top_left" or "bottom_right"; True needs equal lengths, where the two are one."""
    if causal is False or causal == "":
        return ""
    if causal is True:
        if queries != keys:
            complaint = f"is True with {queries} queries and {keys} keys; say 'top_left' or 'bottom_right' when lengths differ"
            raise ArgumentError(row.name, "causal", complaint)
        return "top_left"
    if causal in CAUSAL:
        return causal
    raise ArgumentError(row.name, "causal", f"is {causal!r}; allowed: {', '.join(map(repr, CAUSAL))}")


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cast to the active autocast dtype, as torch's own attention does; float64 stays."""
    kind = tensors[0].device.type if isinstance(tensors[0], torch.Tensor) else "cpu"
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def _require_dense(function: str, name: str, tensor: object) -> None:
    if type(tensor) is torch.Tensor and tensor.layout is torch.strided:
        return
    if not isinstance(tensor, torch.Tensor):
        raise ArgumentTypeError(function, name, f"is a {type(tensor).__name__}; allowed: torch.Tensor")
    if tensor.is_nested:
        raise ArgumentTypeError(function, name, "is a nested tensor; allowed: dense, for example tensor.to_padded_tensor(0.0)")
    if hasattr(tensor, "to_local"):
        raise ArgumentTypeError(function, name, f"is a {type(tensor).__name__}; allowed: a local tensor, for example tensor.to_local()")
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise ArgumentTypeError(function, name, f"has layout {tensor.layout}, dtype {tensor.dtype}; allowed: dense, not quantised")


def _fit(function: str, name: str, given: Input, tensor: torch.Tensor, sizes: dict[str, int]) -> None:
    axes = given.axes.split()
    shape = tensor.shape
    if len(shape) != len(axes):
        raise ArgumentError(function, name, f"has shape {tuple(shape)}; allowed: {len(axes)} axes, '{given.axes}'")
    for axis, size in zip(axes, shape, strict=True):
        known = sizes.setdefault(axis, size)
        if known != size:
            raise ArgumentError(function, name, f"has shape {tuple(shape)} for '{given.axes}'; allowed: {axis} = {known}, as before it")


def _broadcastable(function: str, name: str, given: Input, tensor: torch.Tensor, sizes: Mapping[str, int]) -> None:
    wanted = [sizes[axis] for axis in given.axes.split()]
    shape = tensor.shape
    fits = len(shape) <= len(wanted) and all(size in (1, want) for size, want in zip(reversed(shape), reversed(wanted), strict=False))
    if not fits:
        raise ArgumentError(function, name, f"has shape {tuple(shape)}; allowed: broadcastable to {tuple(wanted)}, '{given.axes}'")


def _same_device(function: str, name: str, tensor: torch.Tensor, first: tuple[str, torch.Tensor]) -> None:
    if tensor.device != first[1].device:
        complaint = f"is on {tensor.device}, {first[0]} on {first[1].device}; they must be on one device"
        raise ArgumentError(function, name, complaint)


def _listed(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(dict.fromkeys(map(str, dtypes)))


