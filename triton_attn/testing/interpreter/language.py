"""The switch: what is exchanged in Triton while strictness is on, and put back after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from torch import Tensor
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as plain
from triton.runtime.autotuner import Autotuner

from triton_attn.testing.interpreter.builder import StrictBuilder, check_overflow
from triton_attn.testing.interpreter.faults import FalsePromise
from triton_attn.testing.interpreter.memory import Bounds
from triton_attn.testing.interpreter.programs import StrictExecutor
from triton_attn.testing.interpreter.reductions import StrictReduceOps, StrictScanOps


@dataclass(frozen=True)
class Settings:
    bounds: Bounds
    races: bool
    overflow: bool
    poison: bool
    tf32: bool
    order: int | None
    reachable: Sequence[Tensor]


_nested: list[Settings] = []
_restoring = ExitStack()
_prepared: set[int] = set()


@contextmanager
def strict(settings: Settings) -> Iterator[None]:
    """Strictness with these settings; inside another block, only the settings change."""
    if not _nested:
        _install()
    _nested.append(settings)
    _apply(settings)
    try:
        yield
    finally:
        _nested.pop()
        if _nested:
            _apply(_nested[-1])
        else:
            _restoring.close()
            _prepared.clear()


def _apply(settings: Settings) -> None:
    builder = plain.interpreter_builder
    builder.poison, builder.tf32 = settings.poison, settings.tf32
    StrictExecutor.bounds, StrictExecutor.races = settings.bounds, settings.races
    StrictExecutor.order, StrictExecutor.reachable = settings.order, settings.reachable
    TritonSemantic.binary_op_sanitize_overflow_impl = check_overflow if settings.overflow else _unchecked


def _exchange(owner: Any, name: str, value: Any) -> None:
    _restoring.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _install() -> None:
    """Put the strict parts in the place of Triton's."""
    builder = plain.interpreter_builder
    # language functions that an earlier, plain launch left patched hold this very builder: it becomes a strict one where it stands
    _exchange(builder, "__class__", StrictBuilder)
    _exchange(builder, "options", replace(builder.options, debug=True))
    _exchange(plain, "InterpreterBuilder", StrictBuilder)
    _exchange(plain, "GridExecutor", StrictExecutor)
    _exchange(plain, "ReduceOps", StrictReduceOps)
    _exchange(plain, "ScanOps", StrictScanOps)
    _exchange(plain.InterpretedFunction, "__call__", _call)
    _exchange(plain.InterpretedFunction, "run", _run)
    _exchange(Autotuner, "run", _first_configuration(Autotuner.run))
    _exchange(TritonSemantic, "binary_op_sanitize_overflow_impl", _unchecked)
    # the language is patched once, not for every launch and every call of a device function
    scope = plain._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    _restoring.callback(scope.restore)
    for module in (tl, tl.core):
        _exchange(module, "multiple_of", _multiple_of)


def _unchecked(semantic: Any, lhs: Any, rhs: Any, operation: Any) -> None:
    return


def _run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    if not warmup:
        function = self.rewrite()
        _prepare(function)
        plain.GridExecutor(function, self.arg_names, grid, self.pre_run_hooks)(*args, **kwargs)


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A device function: exceptions pass as they are, so that a fault keeps its class."""
    function = self.rewrite()
    _prepare(function)
    return function(*args, **kwargs)


def _prepare(function: Any) -> None:
    """Patch what a file took out of the language by name, `exp = tl.exp`."""
    names = function.__globals__
    if id(names) in _prepared:
        return
    _prepared.add(id(names))
    for name, value in list(names.items()):
        if tl.core.is_builtin(value):
            _restoring.callback(names.__setitem__, name, value)
            names[name] = _interpreted(value)


def _interpreted(builtin: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: builtin(*args, **{**kwargs, "_semantic": plain.interpreter_semantic})


def _first_configuration(run: Callable[..., Any]) -> Callable[..., Any]:
    """Autotuning without a GPU: nothing can be timed, so the first configuration serves."""

    def run_first(self: Any, *args: Any, **kwargs: Any) -> Any:
        every = self.configs
        self.configs = every[:1]
        try:
            return run(self, *args, **kwargs)
        finally:
            self.configs = every

    return run_first


def _multiple_of(input: Any, values: Any) -> Any:
    """Check the promise as the compiler reads it: of each run of neighbours along an axis, the first is a multiple."""
    if not isinstance(input, tl.tensor):
        return input
    wanted = [getattr(value, "value", value) for value in (values if isinstance(values, (list, tuple)) else [values])]
    data = input.handle.data
    step = max(1, input.dtype.element_ty.primitive_bitwidth // 8) if input.dtype.is_ptr() else 1
    for axis, value in enumerate(wanted):
        firsts = data
        if input.shape:
            before = np.roll(data, 1, axis) + np.asarray(step, data.dtype)
            starts = data != before
            starts[(slice(None),) * axis + (0,)] = True
            firsts = data[starts]
        if (firsts % np.asarray(value, data.dtype)).any():
            wrong = firsts[firsts % np.asarray(value, data.dtype) != 0].flat[0]
            raise FalsePromise(f"tl.multiple_of(..., {value}), but axis {axis} has {wrong}")
    input.handle.set_attr("tt.divisibility", wanted)
    return input
