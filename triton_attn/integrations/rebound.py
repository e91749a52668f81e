"""Modules that call torch's attention function themselves: the same code of theirs, which finds ours under that name."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import nn

FUNCTION = "scaled_dot_product_attention"
Undo = Callable[[], None]


def calls_torchs_function(module: nn.Module) -> bool:
    """Whether the class's own `forward` names torch.nn.functional.scaled_dot_product_attention."""
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and FUNCTION in code.co_names


def obstacle(module: nn.Module) -> str:
    """Why such a module cannot be rebound; empty if it can."""
    name = type(module).__name__
    if getattr(module, "fused_attn", True) is False or getattr(module, "use_fsdpa", True) is False:
        return f"{name} is set to compute its attention by itself (fused_attn)"
    if getattr(module, "logit_scale", None) is not None and getattr(module, "scaled_cosine", False):
        return f"{name} computes cosine attention, with a learned scale"
    if "forward" in vars(module):
        return f"this {name} has a forward of its own"
    if not _names(type(module).forward):
        return f"{name} reaches torch's function by a way of its own; run it under sdpa_override()"
    return ""


def rebind(module: nn.Module, function: Callable[..., Any]) -> Undo:
    """Give a module a class of its own whose `forward` is the same code with `function` in place of torch's.

    The object stays, with weights, names and hooks; it is still an instance of its class. While rebound it can be copied, and not pickled
    whole.
    """
    changed: Any = module
    kind: Any = type(module)
    forward = kind.forward
    known = {name: function if value is F.scaled_dot_product_attention else _namespace(function) for name, value in _names(forward).items()}
    # without a name torch.compile looks globals up here, and not in the module of that name
    found = {name: value for name, value in {**forward.__globals__, **known}.items() if name != "__name__"}
    rebound = types.FunctionType(forward.__code__, found, forward.__name__, forward.__defaults__, forward.__closure__)
    rebound.__kwdefaults__ = forward.__kwdefaults__
    changed.__class__ = type(kind.__name__, (kind,), {"forward": rebound, "__module__": kind.__module__, "__qualname__": kind.__qualname__})

    def back() -> None:
        changed.__class__ = kind

    return back


def _names(forward: Any) -> dict[str, Any]:
    """The global names in a function by which it may reach torch's."""
    known = {name: forward.__globals__.get(name) for name in forward.__code__.co_names}
    return {name: value for name, value in known.items() if value is F or value is F.scaled_dot_product_attention}


def _namespace(function: Callable[..., Any]) -> types.ModuleType:
    """torch.nn.functional with another attention."""
    other = types.ModuleType(F.__name__)
    vars(other).update({name: value for name, value in vars(F).items() if name != "__name__"})
    vars(other)[FUNCTION] = function
    return other
