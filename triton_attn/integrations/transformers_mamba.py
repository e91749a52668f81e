"""Hugging Face's Mamba and FalconMamba on triton_attn: their mixers have no interface, so the functions that they call are exchanged."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import transformers
from transformers.activations import ACT2FN

from triton_attn import Unsupported, causal_conv1d, causal_conv1d_update, selective_scan, selective_state_update
from triton_attn.integrations.replacement import Replacement

_patched: Replacement | None = None
# what transformers 5.23 lets fall through to a mixer's convolution, which says nothing to it
HARMLESS = frozenset({"attention_mask", "cache_params", "use_cache", "output_hidden_states", "return_dict", "num_items_in_batch"})


def patch_mamba() -> Replacement:
    """Let Hugging Face's Mamba and FalconMamba, models that exist and models to come, compute with triton_attn.

    The functions that their mixers look up are exchanged: scan, convolution and one step of each. In training mode the fused function of
    mamba_ssm, where that is installed, is not asked. A second call while patched changes nothing and returns the same.

    Returns:
        What was replaced; its `undo()` puts everything back, and so does the end of a `with` block.

    Raises:
        Unsupported: this transformers has other functions; nothing was exchanged.
    """
    global _patched
    if _patched is not None:
        return _patched
    from transformers.models.falcon_mamba import modeling_falcon_mamba
    from transformers.models.mamba import modeling_mamba

    modules = (modeling_mamba, modeling_falcon_mamba)
    missing = [f"{module.__name__}.{name}" for module in modules for name in _MAMBA if not hasattr(module, name)]
    if missing:
        raise Unsupported(f"patch_mamba knows transformers 5.23; transformers {transformers.__version__} lacks {', '.join(missing)}")
    originals = [(module, name, getattr(module, name)) for module in modules for name in _MAMBA]
    for module, name, _ in originals:
        setattr(module, name, _MAMBA[name])
    _patched = Replacement({f"{module.__name__}.{name}": _NAMES[name] for module, name, _ in originals}, _undo=[lambda: _back(originals)])
    return _patched


def patched() -> bool:
    """Whether `patch_mamba` is in force."""
    return _patched is not None


def _back(originals: list[tuple[ModuleType, str, Callable[..., Any]]]) -> None:
    global _patched
    for module, name, original in originals:
        setattr(module, name, original)
    _patched = None


def _scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    *rest: Any,
    use_mambapy: bool = False,
    use_associative_scan: bool = False,
    **options: Any,
) -> Any:
    """transformers chooses among its own ways to scan; there is one here."""
    return selective_scan(hidden_states, dt, *rest, **options)


def _convolution(
    hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str | None = None, **others: Any
) -> torch.Tensor:
    for name, given in others.items():
        if given is not None and name not in HARMLESS:
            raise Unsupported(f"a Mamba mixer asks its convolution for {name}, which its scan would ignore; pack no sequences, pad them")
    ours = activation if activation in ("silu", "swish") else None
    out: torch.Tensor = causal_conv1d(hidden_states, weight, bias, ours)
    return out if ours == activation else ACT2FN[activation](out)


def _convolution_step(
    hidden_states: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    ours = activation if activation in ("silu", "swish") else None
    out = causal_conv1d_update(hidden_states, conv_state, weight, bias, ours)
    return out if ours == activation else ACT2FN[activation](out)


def _no_fused_function(*args: Any, **options: Any) -> None:
    """Nothing: then the mixer goes on step by step."""


_MAMBA: dict[str, Callable[..., Any]] = {
    "mamba_selective_scan": _scan,
    "mamba_selective_state_update": selective_state_update,
    "causal_conv1d_fn": _convolution,
    "causal_conv1d_update": _convolution_step,
    "mamba_inner_fn": _no_fused_function,
}

_NAMES = {
    "mamba_selective_scan": "triton_attn.selective_scan",
    "mamba_selective_state_update": "triton_attn.selective_state_update",
    "causal_conv1d_fn": "triton_attn.causal_conv1d",
    "causal_conv1d_update": "triton_attn.causal_conv1d_update",
    "mamba_inner_fn": "nothing: the mixer goes on step by step",
}
