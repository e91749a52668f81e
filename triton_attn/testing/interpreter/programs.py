"""A launch: grid limits, a model of memory, and all programs in the order asked for."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import operator
import random
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.amd import compiler as amd
from triton.backends.nvidia import compiler as nvidia
from triton.runtime import interpreter as plain

from triton_attn.testing.interpreter.faults import InvalidGrid, KernelFault
from triton_attn.testing.interpreter.handles import remember
from triton_attn.testing.interpreter.memory import Bounds, Memory, tensors_in

HIGHEST = (2**31 - 1, 65535, 65535)
LAUNCH_OPTIONS = {field.name for options in (nvidia.CUDAOptions, amd.HIPOptions) for field in dataclasses.fields(options)}
one_launch = threading.RLock()  # the interpreter's state is global


class StrictExecutor(plain.GridExecutor):  # type: ignore[misc]
    """Takes the place of Triton's own while strictness is on."""

    bounds: Bounds = "view"
    races = True
    order: int | None = None
    reachable: Sequence[Tensor] = ()
    programs = 0  # of the launch

    def __call__(self, *args_dev: Any, **kwargs: Any) -> None:
        names = inspect.signature(self.fn).parameters
        unknown = [name for name in kwargs if name not in names and name not in LAUNCH_OPTIONS]
        if unknown:
            raise KeyError(f"{self.fn.__name__} has no argument {unknown[0]!r}, nor has Triton such a launch option")  # Triton's own class
        kwargs = {name: value for name, value in kwargs.items() if name in names}
        tensors = [tensor for value in (*args_dev, *kwargs.values()) for tensor in tensors_in("", value).values()]
        elsewhere = any(tensor.device.type != "cpu" for tensor in tensors)  # else copying would touch far storages whole
        args_hst, kwargs_hst = self._init_args_hst(args_dev, kwargs) if elsewhere else (args_dev, kwargs)
        for hook in self.pre_run_hooks:
            hook(*args_hst, **kwargs_hst)
        given = inspect.getcallargs(self.fn, *args_hst, **kwargs_hst)
        with np.errstate(all="ignore"):  # a GPU overflows without a word
            self.run_programs(given)
        if elsewhere:
            self._restore_args_dev(args_dev, args_hst, kwargs, kwargs_hst)

    def run_programs(self, given: dict[str, Any]) -> None:
        builder = plain.interpreter_builder
        tensors: dict[str, Tensor] = {}
        arguments = {}
        for name, value in given.items():
            if name in self.constexprs:
                arguments[name] = value
                continue
            arguments[name] = _passed(value)
            tensors.update(tensors_in(name, value))
            _name(name, arguments[name])
        program = None
        try:
            grid = _checked(self.grid(arguments) if callable(self.grid) else self.grid)
            self.programs = math.prod(grid)
            builder.memory = Memory(tensors, self.reachable, self.bounds, self.races)
            builder.set_grid_dim(*grid)
            for number, program in _ordered(grid, self.order):
                builder.program = number
                builder.set_grid_idx(*program)
                self.fn(**arguments)
        except KernelFault as fault:
            fault.kernel, fault.program = self.fn.__name__, program
            raise
        finally:
            builder.memory = None


def _passed(value: Any) -> Any:
    """An argument as the compiler sees it. Triton's own leaves a float as Python's, and wraps integers from 2**31 on."""
    if isinstance(value, tuple):
        return plain._tuple_create(value, map(_passed, value))
    if isinstance(value, float):
        return tl.tensor(plain.TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
    if isinstance(value, int) and 2**31 <= value < 2**63:
        return tl.tensor(plain.TensorHandle(np.array([value], np.int64), tl.int64), tl.int64)
    return plain._implicit_cvt(value)


def _name(name: str, argument: Any) -> None:
    """Tell every pointer of an argument which tensor it points to."""
    if isinstance(argument, tuple):
        for i, inner in enumerate(argument):
            _name(f"{name}[{i}]", inner)
    elif isinstance(argument, triton.language.core.tensor) and argument.dtype.is_ptr():
        remember(argument.handle, (name,))
    elif isinstance(argument, triton.language.core.tensor_descriptor_base):
        remember(argument.handle.base, (name,))


def _checked(grid: Sequence[int]) -> tuple[int, int, int]:
    """The grid with three axes, if CUDA and Triton's launcher take it."""
    if not 1 <= len(grid) <= 3:
        raise InvalidGrid(f"grid {tuple(grid)} has {len(grid)} axes; CUDA has 1 to 3")
    x, y, z = (*map(operator.index, grid), 1, 1)[:3]  # a grid computed from arguments is of tensors
    for axis, size, most in zip("xyz", (x, y, z), HIGHEST, strict=True):
        if not 0 <= size <= most:
            raise InvalidGrid(f"grid {(x, y, z)}: axis {axis} is {size}; CUDA takes at most {most}")
    if x * y * z >= 2**31:
        raise InvalidGrid(f"grid {(x, y, z)}: {x * y * z} programs overflow the launcher's int32 product, and nothing would run")
    return x, y, z


def _ordered(grid: tuple[int, int, int], order: int | None) -> Iterator[tuple[int, tuple[int, int, int]]]:
    """(number from 1, ids) of every program, shuffled by the seed `order`."""
    x, y, z = map(range, grid)
    programs = enumerate(itertools.product(x, y, z), start=1)
    if order is not None:
        shuffled = list(programs)
        random.Random(order).shuffle(shuffled)
        return iter(shuffled)
    return programs
