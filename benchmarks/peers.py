"""Peers that the package does not ship: `of_<row>()` gives those that run here. None is a dependency; `make bench` installs some.

A peer takes the row's arguments, and raises NotImplementedError for what it lacks.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from triton_attn.mechanism import Mechanism

Call = Callable[..., Any]


def beside(row: Mechanism) -> Mechanism:
    """The row with the peers of this file after its own."""
    return replace(row, peers={**row.peers, **globals().get(f"of_{row.name}", dict)()})


def of_attention() -> dict[str, Call]:
    """torch's own back ends, FlexAttention, FlashAttention 4; on a CPU there is one SDPA, which the row has."""
    if not torch.cuda.is_available():
        return {}
    peers: dict[str, Call] = {
        "SDPA cuDNN": _sdpa(SDPBackend.CUDNN_ATTENTION),
        "SDPA flash": _sdpa(SDPBackend.FLASH_ATTENTION),
        "SDPA efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
        "FlexAttention": _flex(_dense),
    }
    if importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.cute"):
        peers["FA4"] = _fa4
    return peers


def of_strided_attention() -> dict[str, Call]:
    return {"FlexAttention": _flex(_strided)}


def of_local_global_attention() -> dict[str, Call]:
    peers: dict[str, Call] = {"FlexAttention": _flex(_local_global)}
    if importlib.util.find_spec("local_attention"):
        peers["local-attention"] = _local_attention()
    return peers


def of_dilated_attention() -> dict[str, Call]:
    return {"torchscale's way": _gathered}


def _gathered(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    segment_lengths: Any,
    dilation_rates: Any,
    causal: Any = False,
    **options: Any,
) -> Tensor:
    """As torchscale has it: for each branch gather, attend, scatter; then a mixture by log-sum-exps without a gradient."""
    n, usual = query.shape[2], {None, 0.0, "longnet", "block", "count"}
    if query.shape[1] != key.shape[1] or any(n % length for length in segment_lengths) or not usual.issuperset(options.values()):
        raise NotImplementedError("one key head for each query head, whole segments, the common options")
    attend: Any = torch.ops.aten._scaled_dot_product_flash_attention
    if query.device.type == "cpu":
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    outs, lses = [], []
    for length, rate in zip(segment_lengths, dilation_rates, strict=True):
        # heads in groups of one offset, segments in the batch
        groups = -(-query.shape[1] // rate)
        whole = torch.zeros_like(query)
        weight = query.new_full(query.shape[:3], -torch.inf, dtype=torch.float32)
        for offset, heads in enumerate(range(0, query.shape[1], groups)):
            here = slice(heads, heads + groups)
            q, k, v = (
                torch.unflatten(x[:, here], 2, (-1, length))[:, :, :, offset::rate].transpose(1, 2).flatten(0, 1)
                for x in (query, key, value)
            )
            found, lse, *_ = attend(q.contiguous(), k.contiguous(), v.contiguous(), 0.0, bool(causal))
            lse = lse.detach()
            shape = (query.shape[0], n // length)
            torch.unflatten(whole[:, here], 2, (-1, length))[:, :, :, offset::rate] = torch.unflatten(found, 0, shape).transpose(1, 2)
            torch.unflatten(weight[:, here], 2, (-1, length))[:, :, :, offset::rate] = torch.unflatten(lse, 0, shape).transpose(1, 2)
        outs.append(whole)
        lses.append(weight)
    mixture = torch.stack(lses).softmax(0).nan_to_num().to(query.dtype).unsqueeze(-1)
    return (mixture * torch.stack(outs)).sum(0)


def _sdpa(backend: SDPBackend) -> Call:
    def call(
        query: Any, key: Any, value: Any, *, mask: Any = None, key_padding_mask: Any = None, causal: Any = False, dropout_p: float = 0.0
    ) -> Any:
        if key_padding_mask is not None:
            if backend == SDPBackend.FLASH_ATTENTION:
                raise NotImplementedError("no mask")
            mask = ~key_padding_mask[:, None, None, :]
        with sdpa_kernel(backend):
            grouped = query.shape[1] != key.shape[1]
            return F.scaled_dot_product_attention(query, key, value, mask, dropout_p, bool(causal), enable_gqa=grouped)

    return call


def _dense() -> Call | None:
    return None


def _strided(stride: int, phase: int = 0, include_self: bool = False) -> Call:
    return lambda b, h, i, j: (j % stride == phase) | (include_self & (i == j))


def _local_global(window: int, global_tokens: int = 0) -> Call:
    return lambda b, h, i, j: ((i - j).abs() <= window // 2) | (i < global_tokens) | (j < global_tokens)


def _flex(rule: Callable[..., Call | None]) -> Call:
    """FlexAttention with the block mask of `rule(**options)`: (b, h, i, j) -> whether query i sees key j, None where it always does."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, mode="max-autotune-no-cudagraphs")
    masks: dict[Any, Any] = {}

    def call(
        query: Tensor, key: Tensor, value: Tensor, *, key_padding_mask: Tensor | None = None, causal: Any = False, **options: Any
    ) -> Any:
        options = {name: option for name, option in options.items() if option is not None and not (name == "dropout_p" and not option)}
        if options.keys() & {"mask", "dropout_p", "global_key", "global_value"}:
            raise NotImplementedError("no dropout, no dense mask, no keys from elsewhere")
        if query.device.type == "cpu" and query.requires_grad:
            raise NotImplementedError("FlexAttention has no backward on a CPU")
        name = (query.shape, key.shape, causal, key_padding_mask is None, tuple(options.items()))
        if name not in masks:
            rules = [rule(**options), (lambda b, h, i, j: i >= j) if causal else None]
            if key_padding_mask is not None:
                visible = ~key_padding_mask
                rules.append(lambda b, h, i, j: visible[b, j])
            asked = [each for each in rules if each is not None]
            batch = query.shape[0] if key_padding_mask is not None else None
            masks[name] = asked and create_block_mask(_all_of(asked), batch, None, query.shape[2], key.shape[2], device=query.device)
        try:
            return compiled(query, key, value, block_mask=masks[name] or None, enable_gqa=query.shape[1] != key.shape[1])
        except torch._inductor.exc.InductorError as error:
            raise NotImplementedError("this rule does not compile here") from error

    return call


def _all_of(rules: list[Call]) -> Call:
    from torch.nn.attention.flex_attention import and_masks

    together: Call = and_masks(*rules)
    return together


def _local_attention() -> Call:
    """A band by blocks of `window // 2` keys, each block beside its neighbours."""
    from local_attention import LocalAttention

    layers: dict[tuple[int, int], Any] = {}

    def call(query: Tensor, key: Tensor, value: Tensor, *, window: int, **options: Any) -> Any:
        if any(option is not None and option for option in options.values()):
            raise NotImplementedError("a window alone")
        half, width = window // 2, query.shape[-1]
        if (half, width) not in layers:
            layers[half, width] = LocalAttention(
                dim=width, window_size=half, look_backward=1, look_forward=1, exact_windowsize=True, use_rotary_pos_emb=False, autopad=True
            )
        return layers[half, width](*(x.flatten(0, 1) for x in (query, key, value))).unflatten(0, query.shape[:2])

    return call


def _fa4(
    query: Any, key: Any, value: Any, *, mask: Any = None, key_padding_mask: Any = None, causal: Any = False, dropout_p: float = 0.0
) -> Any:
    from flash_attn.cute import flash_attn_func

    if dropout_p or mask is not None or key_padding_mask is not None:
        raise NotImplementedError("no dropout, no mask")
    out = flash_attn_func(*(x.transpose(1, 2) for x in (query, key, value)), causal=bool(causal))
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


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
    return {"causal-conv1d": _causal_conv1d} if importlib.util.find_spec("causal_conv1d") else {}


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
