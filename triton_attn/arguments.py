"""Arguments in, sizes out, or an error that names the argument, what came and what is allowed, before anything is allocated."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, Protocol

import torch

from triton_attn.mechanism import Input, Mechanism

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CAUSAL = (False, True, "top_left", "bottom_right")


class ArgumentError(ValueError):
    """A wrong argument; `argument` is its name."""

    def __init__(self, function: str, argument: str, complaint: str) -> None:
        super().__init__(f"{function}: {argument} {complaint}")
        self.argument = argument
        self._parts = (function, argument, complaint)

    def __reduce__(self) -> tuple[type[ArgumentError], tuple[str, str, str]]:
        # an exception is rebuilt of its message alone; worker processes send theirs
        return type(self), self._parts


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument of a wrong type or dtype."""


class Named(Protocol):
    """Who complains: a row of the catalogue, a module."""

    @property
    def name(self) -> str:
        """As the message has it."""


Rules = Callable[[Mechanism, Mapping[str, int]], None]

# sizes of calls that passed: what is checked of a tensor is its shape, dtype and device, so calls that agree in them pass alike
_passed: dict[Any, dict[str, int]] = {}
MOST_PASSED = 4096


def check(row: Mechanism, tensors: Mapping[str, torch.Tensor | None], rules: Rules | None = None) -> Mapping[str, int]:
    """Check every tensor of a call against its row, and its sizes by `rules`; return the size of each axis letter.

    Under autocast, dtypes count as cast.
    """
    # a graph would be guarded by all that is remembered
    seen = None if torch.compiler.is_compiling() else _signature(row, tensors, rules)
    sizes = None if seen is None else _passed.get(seen)
    if sizes is None:
        sizes = _checked(row, tensors)
        if rules is not None:
            rules(row, sizes)
        if seen is not None:
            if len(_passed) >= MOST_PASSED:
                _passed.clear()
            _passed[seen] = sizes
    return sizes


def _signature(row: Mechanism, tensors: Mapping[str, torch.Tensor | None], rules: Rules | None) -> Any:
    """All that `check` looks at; None for tensors that are no plain dense ones."""
    found: list[Any] = [row.name, rules]
    for tensor in tensors.values():
        if tensor is None:
            found.append(None)
        elif type(tensor) is torch.Tensor and tensor.layout is torch.strided and not tensor.is_nested:
            if len(found) == 2:
                found.append(autocast_dtype(tensor.device.type))
            found += (tensor.shape, tensor.dtype, tensor.device)
        else:
            return None
    return tuple(found)


def _checked(row: Mechanism, tensors: Mapping[str, torch.Tensor | None]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    first: tuple[str, torch.Tensor] | None = None
    cast, dtype = None, torch.float32
    for name, given in row.inputs.items():
        tensor = tensors[name]
        if given.kind != "values" or (given.optional and tensor is None):
            continue
        _require_dense(row.name, name, tensor)
        assert tensor is not None
        if tensor.dtype not in FLOATS:
            raise ArgumentTypeError(row.name, name, f"has dtype {tensor.dtype}; allowed: {_listed(FLOATS)}")
        if given.dtype != "like inputs":
            assert first is not None
            held = dict.fromkeys((torch.promote_types(dtype, torch.float32), *([first[1].dtype] if "or" in given.dtype else [])))
            if tensor.dtype not in held:
                raise ArgumentTypeError(row.name, name, f"has dtype {tensor.dtype}; allowed: {_listed(tuple(held))}")
            _same_device(row.name, name, tensor, first)
        elif first is None:
            first = (name, tensor)
            cast = autocast_dtype(tensor.device.type)
            dtype = working_dtype(tensor, cast)
        else:
            if working_dtype(tensor, cast) != dtype:
                raise ArgumentTypeError(row.name, name, f"has dtype {tensor.dtype}, {first[0]} has {first[1].dtype}; they must be equal")
            _same_device(row.name, name, tensor, first)
        _fit(row.name, name, given, tensor, sizes)
    for name, given in row.inputs.items():
        tensor = tensors[name]
        if given.kind == "values" or (tensor is None and not given.required) or first is None:
            continue
        _require_dense(row.name, name, tensor)
        assert tensor is not None
        _same_device(row.name, name, tensor, first)
        if given.kind == "mask":
            _broadcastable(row.name, name, given, tensor, sizes)
            if tensor.dtype != torch.bool and tensor.dtype not in (dtype, torch.float32):
                wanted = _listed((torch.bool, dtype, torch.float32))
                raise ArgumentTypeError(row.name, name, f"has dtype {tensor.dtype}; allowed: {wanted} (boolean: True = attend)")
        elif given.kind == "padding":
            _fit(row.name, name, given, tensor, sizes)
            if tensor.dtype != torch.bool:
                raise ArgumentTypeError(row.name, name, f"has dtype {tensor.dtype}; allowed: torch.bool (True = ignore)")
        elif given.kind in ("index", "offsets"):
            _fit(row.name, name, given, tensor, sizes)
            if tensor.dtype not in (torch.int32, torch.int64):
                raise ArgumentTypeError(row.name, name, f"has dtype {tensor.dtype}; allowed: torch.int32, torch.int64")
    return sizes


def divides(row: Mechanism, sizes: Mapping[str, int], inner: tuple[str, str], outer: tuple[str, str]) -> None:
    """(axis, argument) twice: the first size must divide the second."""
    (small, argument), (large, other) = inner, outer
    if sizes[small] == 0 and sizes[large] == 0:
        return
    if sizes[small] == 0 or sizes[large] % sizes[small]:
        raise ArgumentError(row.name, argument, f"has {sizes[small]} heads, which do not divide {other}'s {sizes[large]}")


def within(who: Named, argument: str, what: str, size: int, low: int, high: int) -> None:
    """A size inside its range."""
    if not low <= size <= high:
        raise ArgumentError(who.name, argument, f"has {what} {size}; allowed: {low} to {high}")


def at_least(who: Named, argument: str, what: str, size: int, low: int) -> None:
    """A size with no upper end."""
    if size < low:
        raise ArgumentError(who.name, argument, f"has {what} {size}; allowed: {low} or more")


def probability(who: Named, argument: str, given: float) -> float:
    """A number in [0, 1]; NaN is none."""
    given = _number(who, argument, given, "0 to 1")
    if not 0.0 <= given <= 1.0:
        raise ArgumentError(who.name, argument, f"is {given}; allowed: 0 to 1")
    return float(given)


def finite(who: Named, argument: str, given: float) -> float:
    """A number that is neither infinite nor NaN."""
    given = _number(who, argument, given, "a finite number")
    if not given - given == 0.0:  # NaN for what is not finite; Dynamo takes no math.isfinite of a float that varies
        raise ArgumentError(who.name, argument, f"is {given}; allowed: a finite number")
    return float(given)


def whole(who: Named, argument: str, given: int, low: int, high: int | None = None) -> int:
    """A whole number, `low` and more, up to `high` if there is one."""
    allowed = f"a whole number, {low} and more" if high is None else f"a whole number, {low} to {high}"
    if isinstance(given, bool) or not isinstance(given, (int, torch.SymInt)):
        raise ArgumentTypeError(who.name, argument, f"is {given!r}, a {type(given).__name__}; allowed: {allowed}")
    if given < low or (high is not None and given > high):
        raise ArgumentError(who.name, argument, f"is {given}; allowed: {allowed}")
    return given


def whole_numbers(who: Named, argument: str, given: Sequence[int], low: int = 1) -> list[int]:
    """Whole numbers from `low`, NumPy's too, at least one of them."""
    allowed = f"a sequence of whole numbers, {low} and more"
    try:
        right = isinstance(given, (list, tuple, range)) and len(given) > 0 and not any(isinstance(x, bool) for x in given)
        found = [x if isinstance(x, int) else operator.index(x) for x in given] if right else []
    except TypeError:
        found = []
    if not found:
        raise ArgumentTypeError(who.name, argument, f"is {given!r}; allowed: {allowed}")
    if min(found) < low:
        raise ArgumentError(who.name, argument, f"has {min(found)}; allowed: {allowed}")
    return found


def indices(who: Named, argument: str, given: torch.Tensor, count: int) -> None:
    """So many whole numbers."""
    if not isinstance(given, torch.Tensor) or given.shape != (count,) or given.dtype not in (torch.int32, torch.int64):
        found = f"{given.dtype}, {tuple(given.shape)}" if isinstance(given, torch.Tensor) else type(given).__name__
        raise ArgumentError(who.name, argument, f"is {found}; allowed: ({count},), torch.int32 or torch.int64")


def inside(who: Named, argument: str, given: torch.Tensor, size: int) -> None:
    """Indices of 0 to size - 1; asked only where looking costs nothing: of a real tensor on a CPU."""
    if not _readable(given) or given.numel() == 0:
        return
    low, high = (int(x) for x in torch.aminmax(given))
    if low < 0 or high >= size:
        raise ArgumentError(who.name, argument, f"has {low if low < 0 else high}; allowed: 0 to {size - 1}")


def offsets(row: Mechanism, argument: str, given: torch.Tensor, length: int) -> None:
    """0, then never less than before, then the length; asked only where looking costs nothing."""
    if not _readable(given):
        return
    ends = given.tolist()
    if not ends or ends[0] != 0 or ends[-1] != length or ends != sorted(ends):
        raise ArgumentError(row.name, argument, f"is {ends}; allowed: from 0 to {length}, never less than before")


def _readable(tensor: torch.Tensor) -> bool:
    """Whether this is a real tensor on a CPU that nothing traces or maps."""
    if type(tensor) is not torch.Tensor or tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not torch._C._are_functorch_transforms_active()


def flag(who: Named, argument: str, given: bool) -> bool:
    """True or False."""
    if not isinstance(given, bool):
        raise ArgumentTypeError(who.name, argument, f"is {given!r}, a {type(given).__name__}; allowed: True, False")
    return given


def choice(who: Named, argument: str, given: str, allowed: Sequence[str]) -> str:
    """One of some names."""
    if not isinstance(given, str) or given not in allowed:
        raise ArgumentError(who.name, argument, f"is {given!r}; allowed: {', '.join(map(repr, allowed))}")
    return given


def alignment(row: Mechanism, causal: bool | str, queries: int, keys: int) -> str:
    """Normalise `causal` to "", "top_left" or "bottom_right"; True needs equal lengths, where the two are one."""
    if causal is False:
        return ""
    if causal is True:
        if queries != keys:
            complaint = f"is True with {queries} queries and {keys} keys; say 'top_left' or 'bottom_right' when lengths differ"
            raise ArgumentError(row.name, "causal", complaint)
        return "top_left"
    if isinstance(causal, str) and causal in CAUSAL:
        return causal
    raise ArgumentError(row.name, "causal", f"is {causal!r}; allowed: {', '.join(map(repr, CAUSAL))}")


def autocast_dtype(kind: str) -> torch.dtype | None:
    """What autocast casts to on this device type; None where it is off."""
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def working_dtype(tensor: torch.Tensor, cast: torch.dtype | None) -> torch.dtype:
    """A tensor's dtype once autocast has been at it; float64 stays, as in torch's own attention."""
    return tensor.dtype if cast is None or tensor.dtype == torch.float64 else cast


def autocast(row: Mechanism, tensors: dict[str, torch.Tensor | None], cast: torch.dtype) -> dict[str, torch.Tensor | None]:
    """Checked tensors with the values cast."""
    return {
        name: tensor.to(working_dtype(tensor, cast)) if tensor is not None and _is_cast(row.inputs[name]) else tensor
        for name, tensor in tensors.items()
    }


def _is_cast(given: Input) -> bool:
    return given.kind == "values" and given.dtype == "like inputs"


def causal_bias(given: object) -> bool:
    """Whether this is a torch.nn.attention.bias.CausalBias: a tensor whose numbers nobody ever wrote, only its attributes count."""
    module = sys.modules.get("torch.nn.attention.bias")  # importing it takes Dynamo along; who has a bias has imported it
    return module is not None and isinstance(given, module.CausalBias)


def _number(who: Named, argument: str, given: Any, allowed: str) -> float:
    """A number, NumPy's too, or a tensor of no dimension, as torch takes them: one that varies in a graph or needs a gradient is none."""
    if isinstance(given, (int, float, torch.SymInt, torch.SymFloat)):
        return given  # type: ignore[return-value]
    if type(given) in (torch.Tensor, torch.nn.Parameter):
        known = not (given.requires_grad or given.is_complex() or given.is_meta or torch.compiler.is_compiling())
        if given.ndim == 0 and known:
            return given.item()  # type: ignore[no-any-return]
    elif isinstance(given, Real):
        return float(given)
    raise ArgumentTypeError(who.name, argument, f"is {given!r}, a {type(given).__name__}; allowed: {allowed}")


def _require_dense(function: str, name: str, tensor: object) -> None:
    if type(tensor) is torch.Tensor and tensor.layout is torch.strided and not tensor.is_nested:
        return
    if not isinstance(tensor, torch.Tensor):
        raise ArgumentTypeError(function, name, f"is a {type(tensor).__name__}; allowed: torch.Tensor")
    if causal_bias(tensor):
        raise ArgumentTypeError(function, name, "is a CausalBias, which holds no numbers; allowed: a tensor that does")
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
