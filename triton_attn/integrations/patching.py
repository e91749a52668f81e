"""A whole model on triton_attn in one line, and back; and torch's own attention call, for code that nobody can change.

from triton_attn.integrations.patching import patch, sdpa_override

report = patch(model)
print(report)
report.undo()

with sdpa_override():
    model(x)  # whatever calls torch.nn.functional.scaled_dot_product_attention calls ours: timm, diffusers, your own
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from triton_attn import ArgumentError, scaled_dot_product_attention
from triton_attn.integrations.replacement import Replacement
from triton_attn.nn import MultiheadAttention

NAME = "patch"
Undo = Callable[[], None]


def patch(model: nn.Module) -> Replacement:
    """Let every attention in a model that we can stand in for compute with `triton_attn`: the same function, weights, names and hooks.

    - `torch.nn.MultiheadAttention`, wherever it stands, becomes `triton_attn.nn.MultiheadAttention`: the object stays, its class changes.
      Inside of `nn.TransformerEncoderLayer` the fused evaluation, which never calls it, is turned off, and `nn.TransformerEncoder`
      makes no nested tensors, which no kernel takes.
    - A transformers model with an attention interface gets `attn_implementation="triton_attn"`.

    Args:
        model: left as it is if anything is wrong. OpenCLIP's blocks hold the first kind; for other blocks in them see
            `integrations.open_clip`. timm's attention calls torch's function: see `sdpa_override`.

    Returns:
        What was replaced, what was left and why, and `undo()`, which gives back the model bit for bit.

    Raises:
        ArgumentError: nothing was replaced; the message says what was found instead.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(NAME, "model", f"is a {type(model).__name__}; allowed: torch.nn.Module")
    replaced: dict[str, str] = {}
    skipped: dict[str, str] = {}
    undo: list[Undo] = []
    for place, module in model.named_modules():
        where = place or "the model"
        if type(module) is nn.MultiheadAttention:
            replaced[where] = "triton_attn.nn.MultiheadAttention"
            undo.append(_as_ours(module))
        elif isinstance(module, nn.MultiheadAttention):
            known = isinstance(module, MultiheadAttention)
            skipped[where] = "it is ours already" if known else f"{type(module).__name__} may compute something else"
        elif isinstance(module, nn.TransformerEncoder) and getattr(module, "use_nested_tensor", False):
            undo.append(functools.partial(setattr, module, "use_nested_tensor", True))
            module.use_nested_tensor = False
        elif hasattr(module, "fused_attn") and hasattr(module, "qkv"):
            skipped[where] = f"{type(module).__name__} calls torch's function; run it under sdpa_override()"
    if callable(getattr(model, "set_attn_implementation", None)):
        undo.append(_transformers(model))
        replaced["the attention interface"] = 'attn_implementation="triton_attn"'
    report = Replacement(replaced, skipped, _undo=undo)
    if not replaced:
        report.undo()
        found = "; ".join(f"{where}: {why}" for where, why in skipped.items()) or "no attention that this function knows"
        raise ArgumentError(NAME, "model", f"has {found}; allowed: nn.MultiheadAttention inside, or a transformers model")
    return report


def _as_ours(module: nn.MultiheadAttention) -> Undo:
    changed: Any = module
    changed.__class__ = MultiheadAttention
    changed.on_unsupported = "reference"
    # a layer whose attention has a hook does not take the fused way past it
    hook = module.register_forward_pre_hook(_nothing)

    def back() -> None:
        hook.remove()
        del changed.on_unsupported
        changed.__class__ = nn.MultiheadAttention

    return back


def _nothing(module: nn.Module, arguments: Any) -> None:
    """A hook that leaves everything as it is."""


def _transformers(model: Any) -> Undo:
    from triton_attn.integrations import transformers as ours

    before = model.config._attn_implementation
    ours.register()
    model.set_attn_implementation(ours.NAME)
    return functools.partial(model.set_attn_implementation, before)


class _Local(threading.local):
    inside = False


_local = _Local()
_original = F.scaled_dot_product_attention


@functools.wraps(scaled_dot_product_attention)
def _ours(*args: Any, **kwargs: Any) -> torch.Tensor:
    if _local.inside:  # our own portable path calls torch's
        return _original(*args, **kwargs)
    _local.inside = True
    try:
        return scaled_dot_product_attention(*args, **kwargs)
    finally:
        _local.inside = False


@contextmanager
def sdpa_override() -> Iterator[None]:
    """torch.nn.functional.scaled_dot_product_attention is `triton_attn.scaled_dot_product_attention` inside, for every thread.

    Code that took the function under a name of its own before keeps torch's. May be entered again inside. Not while a graph is compiled:
    enter it around the first call of a compiled model, whose graph keeps what it found.
    """
    before = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _ours
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before
