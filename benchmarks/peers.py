"""Peers that the package does not ship: `of_<row>()` gives those that run here. None is a dependency; `make bench` installs some.

A peer takes the row's arguments, and raises NotImplementedError for what it lacks. Those of the scan are in mamba_peers.py, FlexAttention
is in flex_peers.py. TARGETS has what a ratio is to reach on an H200; none of them has been measured yet.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.flex_peers import dense, flex, flex_subset, local_global, strided
from benchmarks.mamba_peers import of_causal_conv1d, of_selective_scan
from triton_attn.bench import BOTH, FORWARD
from triton_attn.mechanism import Mechanism

Call = Callable[..., Any]

# (mechanism, workload, direction) -> peer -> the peer's time over ours that is aimed at, bfloat16 on an H200
TARGETS: dict[tuple[str, str, str], dict[str, float]] = {
    ("attention", "dense d128", FORWARD): {"FA4": 0.92, "SDPA cuDNN": 0.92, "SDPA flash": 1.6, "FlexAttention": 1.25},
    ("attention", "dense d64", FORWARD): {"FA4": 0.95, "SDPA cuDNN": 0.95},
    ("attention", "causal d128 16k", FORWARD): {"FA4": 0.92, "SDPA cuDNN": 0.92},
    ("attention", "causal d128 2k", FORWARD): {"FA4": 0.95, "SDPA cuDNN": 0.95},
    ("attention", "short d64", FORWARD): {"FA4": 1.05, "SDPA cuDNN": 1.05},
    ("attention", "dropout d64", BOTH): {"SDPA flash": 1.4, "SDPA cuDNN": 0.85},
    ("attention", "padded keys d64", BOTH): {"FlexAttention": 1.4, "SDPA efficient": 2.0},
    ("attention", "cross d64", FORWARD): {"FA4": 1.0, "SDPA cuDNN": 1.0, "SDPA flash": 1.0, "SDPA efficient": 1.0},
    ("local_global_attention", "window 512, 64 summaries, d128", FORWARD): {"FlexAttention": 1.4},
    ("local_global_attention", "window 128, d64", FORWARD): {"FlexAttention": 1.8, "local-attention": 6.0},
    ("subset_attention", "one key in eight", FORWARD): {"torch SDPA on a copy, without own keys": 1.1},
    ("dilated_attention", "16k, three branches", FORWARD): {"torchscale's way": 3.0},
    ("dilated_attention", "16k, three branches", BOTH): {"torchscale's way": 3.0},
    ("linear_attention", "causal 8k, 96 heads", FORWARD): {"fla chunk": 3.0, "fla fused chunk": 3.0},
    ("linear_attention", "causal 8k, 96 heads", BOTH): {"fla chunk": 3.0, "fla fused chunk": 3.0},
    ("linear_attention", "causal 16k, 16 heads", FORWARD): {"fla chunk": 3.0, "fla fused chunk": 3.0},
    ("linear_attention", "causal 16k, 16 heads", BOTH): {"fla chunk": 3.0, "fla fused chunk": 3.0},
    ("selective_scan", "batch 8, 2048 tokens", FORWARD): {"mamba-ssm": 1.7, "mambapy": 20.0},
    ("selective_scan", "batch 8, 2048 tokens", BOTH): {"mamba-ssm": 1.4},
    ("selective_scan", "batch 1, 16384 tokens", FORWARD): {"mamba-ssm": 1.7, "mambapy": 20.0},
    ("causal_conv1d", "batch 8, 2048 tokens", FORWARD): {"causal-conv1d": 1.0, "fla": 1.0},
    ("performer_attention", "whole 4k", FORWARD): {"performer-pytorch": 6.0},
    ("performer_attention", "causal 4k", FORWARD): {"performer-pytorch": 30.0},
}


def target(mechanism: str, workload: str, direction: str, peer: str) -> float | None:
    """The ratio aimed at, where there is one."""
    return TARGETS.get((mechanism, workload, direction), {}).get(peer)


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
        "FlexAttention": flex(dense),
    }
    if importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.cute"):
        peers["FA4"] = _fa4
    if importlib.util.find_spec("fla"):
        peers["fla"] = _fla_attention
    return peers


def of_strided_attention() -> dict[str, Call]:
    return {"FlexAttention": flex(strided)}


def of_local_global_attention() -> dict[str, Call]:
    peers: dict[str, Call] = {"FlexAttention": flex(local_global)}
    if importlib.util.find_spec("local_attention"):
        peers["local-attention"] = _local_attention()
    return peers


def of_subset_attention() -> dict[str, Call]:
    return {"FlexAttention": flex_subset()}


def of_linear_attention() -> dict[str, Call]:
    """fla's two ways over chunks."""
    return {"fla chunk": _fla_linear("chunk"), "fla fused chunk": _fla_linear("fused chunk")} if importlib.util.find_spec("fla") else {}


def of_performer_attention() -> dict[str, Call]:
    return {"performer-pytorch": _performer_pytorch} if importlib.util.find_spec("performer_pytorch") else {}


def of_add_layer_norm() -> dict[str, Call]:
    """fla's, which adds in the kernel, and Liger's, which does not."""
    peers: dict[str, Call] = {}
    if importlib.util.find_spec("fla"):
        peers["fla"] = _fla_norm
    if importlib.util.find_spec("liger_kernel"):
        peers["eager sum, Liger"] = _liger_norm
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


def _fla_attention(
    query: Any, key: Any, value: Any, *, mask: Any = None, key_padding_mask: Any = None, causal: Any = False, dropout_p: float = 0.0
) -> Any:
    """fla's softmax attention, which is causal."""
    from fla.ops.attn import parallel_attn

    if dropout_p or mask is not None or key_padding_mask is not None or not causal or query.shape[2] != key.shape[2]:
        raise NotImplementedError("causal attention of a sequence to itself, no dropout, no mask")
    return parallel_attn(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)


def _fla_linear(way: str) -> Call:
    """Its features are made before, in memory."""

    def call(
        query: Any, key: Any, value: Any, *, feature_map: str = "elu", causal: bool = False, normalize: bool = True, **given: Any
    ) -> Any:
        from fla.ops.linear_attn import chunk_linear_attn, fused_chunk_linear_attn

        if not causal or query.shape[1] != key.shape[1] or any(x is not None for x in given.values()):
            raise NotImplementedError("causal, one key head for each query head, no padding, states, scale or eps")
        q, k = (FEATURES[feature_map](x).transpose(1, 2) for x in (query, key))
        attend = chunk_linear_attn if way == "chunk" else fused_chunk_linear_attn
        out, _ = attend(q, k, value.transpose(1, 2), scale=1.0, normalize=normalize)
        return out.transpose(1, 2)

    return call


FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "crelu": lambda x: torch.cat((x.relu(), (-x).relu()), -1),
    "identity": lambda x: x,
}


def _fla_norm(x: Any, residual: Any = None, weight: Any = None, bias: Any = None, *, alpha: float = 1.0, eps: float = 1e-5) -> Any:
    try:
        from fla.modules.norm.layernorm import layer_norm
    except ImportError:  # where other versions keep it
        from fla.modules.layernorm import layer_norm

    if alpha != 1.0 or weight is None:
        raise NotImplementedError("no alpha, and a weight")
    return layer_norm(x, weight, bias, residual=residual, eps=eps)


def _liger_norm(x: Any, residual: Any = None, weight: Any = None, bias: Any = None, *, alpha: float = 1.0, eps: float = 1e-5) -> Any:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    if weight is None or bias is None:
        raise NotImplementedError("a weight and a bias")
    return LigerLayerNormFunction.apply(x if residual is None else x + alpha * residual, weight, bias, eps)


def _performer_pytorch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    *,
    causal: bool = False,
    kernel_epsilon: float = 1e-4,
    key_padding_mask: Tensor | None = None,
    initial_state: Any = None,
    **options: Any,
) -> Any:
    """Its call, made once for these features; it has nothing else."""
    if query.shape[1] != key.shape[1] or key_padding_mask is not None or initial_state is not None or kernel_epsilon != 1e-4:
        raise NotImplementedError("no shared keys, padding or states")
    return _fast_attention(*projection.shape, causal, query.device)(query, key, value)


@functools.cache
def _fast_attention(features: int, width: int, causal: bool, where: torch.device) -> Any:
    from performer_pytorch import FastAttention

    return FastAttention(dim_heads=width, nb_features=features, causal=causal).to(where)


__all__ = ["TARGETS", "beside", "of_causal_conv1d", "of_selective_scan", "target"]
