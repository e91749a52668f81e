"""What a block remembers beside its values: which arguments its pointers came from, and which lanes hold poison."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter as plain

Handle = Any  # plain.TensorHandle; Triton has no types


def following(name: str) -> Callable[..., Handle]:
    """The plain operation; pointers in its result remember which arguments they came from, lanes whether they hold poison."""
    operation = getattr(plain.InterpreterBuilder, name)

    def computed(self: Any, *handles: Any) -> Handle:
        result = operation(self, *handles)
        remember(result, origins(handles))
        if any(poisoned(handle) is not None for handle in handles) and name not in ("create_addptr", "create_bitcast"):
            lanes = operation(self, *(lanes_of(handle) if isinstance(handle, plain.TensorHandle) else handle for handle in handles))
            for one, its in zip(*((x if isinstance(x, tuple) else (x,)) for x in (result, lanes)), strict=True):
                one.attr["poisoned"] = its.data
        return result

    return computed


def poisoned(handle: Any) -> NDArray[np.bool_] | None:
    """Which lanes hold an integer that nobody loaded, or what was computed from one; None if none does."""
    return getattr(handle, "attr", {}).get("poisoned")


def lanes_of(handle: Handle) -> Handle:
    """The same block, of truth values: whether a lane holds poison."""
    found = poisoned(handle)
    return plain.TensorHandle(np.zeros(handle.data.shape, np.bool_) if found is None else found, tl.int1)


def spread(result: Handle, *handles: Handle) -> Handle:
    """Poison of any operand is in the result."""
    found = [lanes for handle in handles if (lanes := poisoned(handle)) is not None]
    if found:
        result.attr["poisoned"] = np.broadcast_to(functools.reduce(np.logical_or, found), result.data.shape)
    return result


def origins(handles: Iterable[Any]) -> tuple[str, ...]:
    """Names of the tensor arguments behind some pointers."""
    found = [getattr(handle, "attr", {}).get("origins", ()) for handle in handles]
    return tuple(dict.fromkeys(name for names in found for name in names))


def remember(handle: Handle, names: tuple[str, ...]) -> None:
    if names:
        for each in handle if isinstance(handle, tuple) else (handle,):
            each.attr["origins"] = names
