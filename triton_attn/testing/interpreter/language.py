"""The switch: what is exchanged in Triton while strictness is on, and put back after it."""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import CellType, FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from torch import Tensor
from triton.backends.nvidia import compiler as nvidia
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as plain
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from triton_attn import device
from triton_attn.testing.interpreter import libdevice
from triton_attn.testing.interpreter.builder import StrictBuilder, check_overflow
from triton_attn.testing.interpreter.faults import FalsePromise, StrictnessError
from triton_attn.testing.interpreter.memory import Bounds
from triton_attn.testing.interpreter.programs import StrictExecutor, one_launch
from triton_attn.testing.interpreter.reductions import StrictReduceOps, StrictScanOps
from triton_attn.testing.interpreter.strict import Record


@dataclass(frozen=True)
class Settings:
    bounds: Bounds
    races: bool
    overflow: bool
    poison: bool
    tf32: bool
    order: int | None
    reachable: Sequence[Tensor]
    record: Record


_nested: list[Settings] = []
_rewritten: dict[Any, Any] = {}
_restoring = ExitStack()


@contextmanager
def strict(settings: Settings) -> Iterator[None]:
    """Strictness with these settings; inside another block, only the settings change."""
    _nested.append(settings)
    try:
        if len(_nested) == 1:
            _install()
        _apply(settings)
        yield
    finally:
        _nested.pop()
        if _nested:
            _apply(_nested[-1])
        else:
            _restoring.close()


def _apply(settings: Settings) -> None:
    builder = plain.interpreter_builder
    builder.poison, builder.tf32, builder.overflow = settings.poison, settings.tf32, settings.overflow
    StrictExecutor.bounds, StrictExecutor.races = settings.bounds, settings.races
    StrictExecutor.order, StrictExecutor.reachable = settings.order, settings.reachable
    TritonSemantic.binary_op_sanitize_overflow_impl = check_overflow if settings.overflow else _unchecked


def _exchange(owner: Any, name: str, value: Any) -> None:
    _restoring.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _install() -> None:
    """Put the strict parts in the place of Triton's."""
    builder = plain.interpreter_builder
    _restoring.callback(vars(builder).update, dict(vars(builder)))
    _restoring.callback(vars(builder).clear)
    # language functions that an earlier, plain launch left patched hold this very builder: it becomes a strict one where it stands
    _exchange(builder, "__class__", StrictBuilder)
    precisions = nvidia.CUDAOptions.allowed_dot_input_precisions
    _exchange(builder, "options", replace(builder.options, debug=True, allowed_dot_input_precisions=precisions))
    _exchange(plain, "InterpreterBuilder", StrictBuilder)
    _exchange(plain, "GridExecutor", StrictExecutor)
    _exchange(plain, "ReduceOps", StrictReduceOps)
    _exchange(plain, "ScanOps", StrictScanOps)
    _exchange(plain.InterpretedFunction, "__call__", _call)
    _exchange(plain.InterpretedFunction, "run", _run)
    _exchange(device, "interpreter_computes_bfloat16", True)
    _exchange(Autotuner, "run", _first_configuration(Autotuner.run))
    _exchange(TritonSemantic, "binary_op_sanitize_overflow_impl", _unchecked)
    _exchange(TritonSemantic, "_has_native_tma", lambda semantic: True)  # it asks a GPU that is not there
    _exchange(TritonSemantic, "load", _telling(TritonSemantic.load))
    # the language is patched once, not for every launch and every call of a device function
    scope = plain._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    _restoring.callback(scope.restore)
    for module in (tl, tl.core):
        _exchange(module, "multiple_of", _multiple_of)
        _exchange(module, "range", counted)
    for device_library, name in list(libdevice.functions()):
        _exchange(device_library, name, libdevice.interpreted(name))
    # kernels rewritten for loops of tensors, beside those that plain interpretation has rewritten
    _exchange(plain.FunctionRewriter, "ast_transformer", _Counting())
    _exchange(plain.FunctionRewriter, "_compile_and_exec", _enclosed(plain.FunctionRewriter._compile_and_exec))
    _exchange(plain.InterpretedFunction, "rewritten_fn", _rewritten)
    _exchange(JITFunction, "run", _refused)
    plain.interpreter_semantic.counted = counted
    _restoring.callback(delattr, plain.interpreter_semantic, "counted")


def _unchecked(semantic: Any, lhs: Any, rhs: Any, operation: Any) -> None:
    return


def _telling(load: Callable[..., Any]) -> Callable[..., Any]:
    """Of a scalar, Triton asks whether `other` is true, in place of whether it is given: told apart from none, 0 is no poison."""

    def told(self: Any, ptr: Any, mask: Any, other: Any, *rest: Any, **named: Any) -> Any:
        plain.interpreter_builder.other_given = other is not None
        try:
            return load(self, ptr, mask, other, *rest, **named)
        finally:
            plain.interpreter_builder.other_given = False

    return told


def _run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    if warmup:
        return
    with one_launch:
        function = _prepared(self)
        executor = plain.GridExecutor(function, self.arg_names, grid, self.pre_run_hooks)
        plain.interpreter_builder.multiplied_in_tf32 = False
        for settings in _nested:
            settings.record.launches += 1
        executor(*args, **kwargs)
        for settings in _nested:
            settings.record.programs = max(settings.record.programs, executor.programs)
            settings.record.tf32 |= plain.interpreter_builder.multiplied_in_tf32


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A device function: exceptions pass as they are, so that a fault keeps its class."""
    return _prepared(self)(*args, **kwargs)


def _prepared(jitted: Any) -> Any:
    """The Python function to run. What its file took out of the language by name, `exp = tl.exp`, is patched first."""
    function = jitted.rewrite()
    full = f"{jitted.fn.__module__}.{jitted.fn.__qualname__}"
    if full not in _nested[-1].record.functions:
        for settings in _nested:
            settings.record.functions[full] = jitted
        names = function.__globals__
        for name, value in list(names.items()):
            if (interpreted := _interpreted(value)) is not None:
                _restoring.callback(names.__setitem__, name, value)
                names[name] = interpreted
    return function


def _interpreted(value: Any) -> Callable[..., Any] | None:
    """What stands for a function of the language, or of libdevice; None for anything else."""
    if (known := libdevice.named(value)) is not None:
        return libdevice.interpreted(known)
    if not tl.core.is_builtin(value):
        return None
    return lambda *args, **kwargs: value(*args, **{**kwargs, "_semantic": plain.interpreter_semantic})


def _enclosed(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Triton compiles a function by itself, where it does not see the variables of the function around it: it gets its cells back."""

    def compiled_inside(self: Any, module: ast.Module) -> Any:
        fn = self.fn
        if not fn.__closure__:
            return compiled(self, module)
        cells = dict(zip(fn.__code__.co_freevars, fn.__closure__, strict=True))
        around = ast.parse(f"def {fn.__name__}({', '.join(cells)}): return {fn.__name__}")
        around.body[0].body.insert(0, module.body[0])  # type: ignore[attr-defined]
        code = compiled(self, ast.fix_missing_locations(around))(*cells).__code__
        function = FunctionType(code, fn.__globals__, fn.__name__, fn.__defaults__, tuple(_cell(cells[name]) for name in code.co_freevars))
        function.__annotations__, function.__kwdefaults__ = fn.__annotations__, fn.__kwdefaults__
        return function

    return compiled_inside


def _cell(cell: CellType) -> CellType:
    """The same, unless it holds a function that has to be interpreted."""
    try:
        interpreted = _interpreted(cell.cell_contents)
    except ValueError:  # nothing is in it yet
        return cell
    return cell if interpreted is None else CellType(interpreted)


def _refused(self: Any, *args: Any, **kwargs: Any) -> Any:
    raise StrictnessError(f"{self.__name__} was compiled, not interpreted: set TRITON_INTERPRET=1 before the kernel's module is imported")


class _Counting(plain.ASTTransformer):  # type: ignore[misc]
    """Python's own range counts in integers without end, in place of a tensor that overflows, divides as C does, and has `.to`."""

    def visit_For(self, node: ast.For) -> Any:
        found = self.generic_visit(node)
        called = node.iter
        if isinstance(called, ast.Call) and isinstance(called.func, ast.Name) and called.func.id == "range":
            counted = ast.Attribute(ast.Name("interpreter_semantic", ast.Load()), "counted", ast.Load())
            called.func = ast.copy_location(counted, called.func)
        return found


def counted(first: Any, second: Any = None, step: Any = 1, **hints: Any) -> Iterator[Any]:
    """The values of a loop as the compiler has them: scalars of the type that its bounds have in common."""
    bounds = [first if second is not None else 0, first if second is None else second, step]
    start, stop, by = (operator.index(getattr(bound, "value", bound)) for bound in bounds)
    kinds = [
        bound.dtype if isinstance(bound, tl.tensor) else tl.int32 if -(2**31) <= x < 2**31 else tl.int64
        for bound, x in zip(bounds, (start, stop, by), strict=True)
    ]
    kind = functools.reduce(plain.interpreter_semantic.integer_promote_impl, kinds)
    for i in range(start, stop, by):
        yield tl.tensor(plain.TensorHandle(np.array([i], plain._get_np_dtype(kind)), kind), kind)


def _first_configuration(run: Callable[..., Any]) -> Callable[..., Any]:
    """Autotuning without a GPU: nothing can be timed, so the first configuration serves that its pruning leaves."""

    def run_first(self: Any, *args: Any, **kwargs: Any) -> Any:
        with one_launch:
            every = self.configs
            self.configs = _left(self, args, kwargs)[:1]
            try:
                return run(self, *args, **kwargs)
            finally:
                self.configs = every

    return run_first


def _left(tuner: Any, args: Any, kwargs: Any) -> Sequence[Any]:
    """The configurations that the tuner's own pruning leaves for this call."""
    if not tuner.early_config_prune or len(tuner.configs) < 2:
        return tuner.configs  # type: ignore[no-any-return]
    try:
        left = tuner.early_config_prune(tuner.configs, dict(zip(tuner.arg_names, args, strict=False)), **kwargs)
    except (RuntimeError, AssertionError):  # it asks a GPU that is not there
        left = ()
    return left or tuner.configs  # type: ignore[no-any-return]


def _multiple_of(input: Any, values: Any) -> Any:
    """Check the promise as the compiler reads it: of each run of neighbours along an axis, the first is a multiple."""
    if not isinstance(input, tl.tensor):
        return input
    wanted = [getattr(value, "value", value) for value in (values if isinstance(values, (list, tuple)) else [values])]
    if len(wanted) != max(1, len(input.shape)):
        raise ValueError(f"tl.multiple_of of {len(wanted)} values for {len(input.shape)} axes")
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
