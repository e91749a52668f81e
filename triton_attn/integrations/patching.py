"""A whole model on triton_attn in one line, and back; and torch's own attention call, for code that nobody can change.

report = triton_attn.patch(model)
print(report)
report.undo()

with triton_attn.sdpa_override():
    model(x)  # whatever calls torch.nn.functional.scaled_dot_product_attention calls ours
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
from triton_attn.integrations import rebound
from triton_attn.integrations.mechanisms import Choice, PatchedMultiheadAttention, chosen
from triton_attn.integrations.replacement import Replacement
from triton_attn.nn import MultiheadAttention

NAME = "patch"
Undo = Callable[[], None]
Plan = dict[str, tuple[str, Callable[[], Undo]]]  # place -> (what will stand there, how to put it there)


def patch(model: nn.Module, mechanism: str = "attention", **options: Any) -> Replacement:
    """Let every attention in a model that we can stand in for compute with `triton_attn`: the same weights, names and hooks.

    - `torch.nn.MultiheadAttention`, wherever it stands, becomes `triton_attn.nn.MultiheadAttention`: the object stays, its class changes.
      Inside of `nn.TransformerEncoderLayer` the fused evaluation, which never calls it, is turned off, and `nn.TransformerEncoder`
      makes no nested tensors, which no kernel takes. OpenCLIP's blocks hold this kind.
    - A module whose own `forward` calls torch.nn.functional.scaled_dot_product_attention, such as timm's and OpenCLIP's `Attention` and
      diffusers' processors' modules, finds ours under that name.
    - A transformers model gets our attention interface, and the vision towers of video models one call for all windows.
    - transformers' Mamba and FalconMamba: `integrations.transformers.patch_mamba`.

    Args:
        model: left as it is if anything is wrong.
        mechanism: "attention" computes the same function. Another one, such as "local_global_attention", computes its own, and the report
            says so: the model then needs training.
        options: the mechanism's own, such as window=64.

    Returns:
        What was replaced, what was left and why, and `undo()`, which gives back the model bit for bit; also a context manager.

    Raises:
        ArgumentError: nothing can be replaced (the message says what was found instead), there is no such mechanism or option, or the
            model hides the future and the mechanism cannot. Nothing has changed then.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(NAME, "model", f"is a {type(model).__name__}; allowed: torch.nn.Module")
    choice = chosen(NAME, mechanism, options)
    plan, skipped = Plan(), dict[str, str]()
    for place, module in model.named_modules():
        _plan_module(place or "the model", module, choice, plan, skipped)
    if hasattr(model, "set_attn_implementation"):
        _plan_transformers(model, choice, plan, skipped)
    if not plan:
        found = "; ".join(f"{where}: {why}" for where, why in skipped.items()) or "no attention that this function knows"
        raise ArgumentError(NAME, "model", f"has {found}; allowed: a model with an attention that can be replaced")
    undo: list[Undo] = []
    report = Replacement({where: what for where, (what, _) in plan.items()}, skipped, changes_function=not choice.exact, _undo=undo)
    try:
        for _, change in plan.values():
            undo.append(change())
        undo += [_without_nested_tensors(module) for module in model.modules() if getattr(module, "use_nested_tensor", False)]
    except Exception:
        report.undo()
        raise
    return report


def _plan_module(where: str, module: nn.Module, choice: Choice, plan: Plan, skipped: dict[str, str]) -> None:
    name = type(module).__name__
    if type(module) is nn.MultiheadAttention:
        what = "triton_attn.nn.MultiheadAttention" + ("" if choice.exact else f" with {choice.mechanism}")
        plan[where] = what, functools.partial(_as_ours, module, choice)
    elif isinstance(module, nn.MultiheadAttention):
        skipped[where] = "it is ours already" if isinstance(module, MultiheadAttention) else f"{name} may compute something else"
    elif rebound.calls_torchs_function(module) and not type(module).__module__.startswith("triton_attn."):
        if why := rebound.obstacle(module):
            skipped[where] = why
        else:
            function = scaled_dot_product_attention if choice.exact else choice.as_torchs()
            plan[where] = f"{name} on triton_attn.{choice.mechanism}", functools.partial(rebound.rebind, module, function)


def _as_ours(module: nn.MultiheadAttention, choice: Choice) -> Undo:
    changed: Any = module
    changed.__class__ = MultiheadAttention if choice.exact else PatchedMultiheadAttention
    changed.on_unsupported = "reference"
    changed.choice = choice
    # a layer whose attention has a hook does not take the fused way past it
    hook = module.register_forward_pre_hook(_nothing)

    def back() -> None:
        hook.remove()
        del changed.on_unsupported, changed.choice
        changed.__class__ = nn.MultiheadAttention

    return back


def _nothing(module: nn.Module, arguments: Any) -> None:
    """A hook that leaves everything as it is."""


def _without_nested_tensors(encoder: Any) -> Undo:
    encoder.use_nested_tensor = False
    return functools.partial(setattr, encoder, "use_nested_tensor", True)


def _plan_transformers(model: Any, choice: Choice, plan: Plan, skipped: dict[str, str]) -> None:
    try:
        from triton_attn.integrations import transformers as ours
    except ImportError as error:
        raise ArgumentError(NAME, "model", f"is of a transformers that this package does not know: {error}") from error
    ours.plan(NAME, model, choice, plan, skipped)


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

    `nn.MultiheadAttention` takes no fused evaluation inside, so that it makes the call. Code that took the function under a name of its
    own before keeps torch's. May be entered again inside. Not while a graph is compiled: enter it around the first call of a compiled
    model, whose graph keeps what it found.
    """
    before, fast = F.scaled_dot_product_attention, torch.backends.mha.get_fastpath_enabled()
    F.scaled_dot_product_attention = _ours
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before
        torch.backends.mha.set_fastpath_enabled(fast)
