"""Peers of the scan and of the convolution beside it, as peers.py has them for attention."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

Call = Callable[..., Any]


def of_selective_scan() -> dict[str, Call]:
    """mambapy's scan, the loop of Hugging Face's Mamba, mamba_ssm."""
    peers: dict[str, Call] = {}
    if importlib.util.find_spec("mambapy"):
        peers["mambapy"] = _mambapy
    if importlib.util.find_spec("transformers"):
        peers["transformers' loop"] = _transformers
    if importlib.util.find_spec("mamba_ssm") and importlib.util.find_spec("selective_scan_cuda"):
        peers["mamba-ssm"] = _mamba_ssm
    return peers


def of_causal_conv1d() -> dict[str, Call]:
    """causal-conv1d and fla's."""
    peers: dict[str, Call] = {}
    if importlib.util.find_spec("causal_conv1d"):
        peers["causal-conv1d"] = _causal_conv1d
    if importlib.util.find_spec("fla"):
        peers["fla"] = _fla_conv1d
    return peers


def _one_group(given: dict[str, Any], B: Any, C: Any) -> tuple[Any, Any]:
    """(B, N, L) twice; these peers know nothing of ours beside mamba_ssm's arguments."""
    if any(x is not None for x in given.values()) or B.shape[1] != 1:
        raise NotImplementedError("no masks, states, packed sequences or groups")
    return B[:, 0], C[:, 0]


def _mambapy(
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any = None,
    z: Any = None,
    delta_bias: Any = None,
    delta_softplus: bool = False,
    **given: Any,
) -> Any:
    """As mambapy's block calls its scan."""
    from mambapy.pscan import pscan

    B, C = (x.mT for x in _one_group(given, B, C))
    size = (delta if delta_bias is None else delta + delta_bias[:, None]).mT
    size = F.softplus(size) if delta_softplus else size
    decay = torch.exp(size.unsqueeze(-1) * A)
    states = pscan(decay, size.unsqueeze(-1) * B.unsqueeze(2) * u.mT.unsqueeze(-1))
    y = (states @ C.unsqueeze(-1)).squeeze(3).mT
    y = y if D is None else y + D[:, None] * u
    return y if z is None else y * F.silu(z)


def _transformers(
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any = None,
    z: Any = None,
    delta_bias: Any = None,
    delta_softplus: bool = False,
    **given: Any,
) -> Any:
    """What Hugging Face's Mamba does without mamba_ssm: a loop over steps."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    return mamba_selective_scan(u, delta, A, *_one_group(given, B, C), D, z, delta_bias, delta_softplus)


def _mamba_ssm(
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any = None,
    z: Any = None,
    delta_bias: Any = None,
    delta_softplus: bool = False,
    **given: Any,
) -> Any:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return selective_scan_fn(u, delta, A, *_one_group(given, B, C), D, z, delta_bias, delta_softplus)


def _causal_conv1d(
    x: Any, weight: Any, bias: Any = None, activation: Any = None, *, initial_states: Any = None, seq_idx: Any = None
) -> Any:
    from causal_conv1d import causal_conv1d_fn

    if initial_states is not None or seq_idx is not None:
        raise NotImplementedError("only of channels last")
    return causal_conv1d_fn(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), activation=activation)


def _fla_conv1d(x: Any, weight: Any, bias: Any = None, activation: Any = None, *, initial_states: Any = None, seq_idx: Any = None) -> Any:
    """fla's has steps before channels."""
    try:
        from fla.modules.causal_conv1d import causal_conv1d
    except ImportError:  # where other versions keep it
        from fla.modules.conv import causal_conv1d

    if initial_states is not None or seq_idx is not None:
        raise NotImplementedError("no states, no packed sequences")
    out, _ = causal_conv1d(x.mT, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), activation=activation)
    return out.mT
