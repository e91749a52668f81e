"""Calls that are several kernels together, timed as if each were a row of the catalogue."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.flex_peers import flex
from benchmarks.linear_peers import FEATURES
from triton_attn import CATALOG, ripple_attention, sparse_attention
from triton_attn.mechanism import Case, Kernel, Mechanism, Options, Sizes, Work

Layer = tuple[Tensor, Tensor, Tensor, Tensor]


def _kernels(*names: str) -> tuple[Kernel, ...]:
    return tuple(kernel for name in names for kernel in CATALOG[name].kernels)


# Child et al.'s strided pattern: a band, and the tokens of the same residue


def _blocks_apart(block: int) -> Callable[..., Any]:
    return lambda b, h, i, j: (i - j <= block) | ((i - j) % block == 0)


def _strided(query: Tensor, key: Tensor, value: Tensor, *, block: int, causal: bool = True) -> Any:
    return sparse_attention(query, key, value, selection="strided", block=block, causal=causal)


def _dense_causal(query: Tensor, key: Tensor, value: Tensor, *, block: int, causal: bool = True) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal)


def _strided_work(sizes: Sizes, options: Options, itemsize: int) -> Work:
    b, h, n, d, e, block = *(sizes[axis] for axis in "bhmde"), options["block"]
    pairs = sum(min(i, block) + 1 + max(i // block - 1, 0) for i in range(n))
    moved = itemsize * b * h * n * (2 * d + 2 * e)
    return Work(flops=2.0 * b * h * pairs * (d + e), bytes=float(moved), exponentials=float(b * h * pairs))


_SHAPES = {"b": 1, "h": 16, "g": 16, "m": 16384, "n": 16384, "d": 64, "e": 64}
STRIDED = replace(
    CATALOG["strided_attention"],
    name="sparse_attention",
    function=_strided,
    kernels=_kernels("local_global_attention", "attention"),
    inputs={name: CATALOG["strided_attention"].inputs[name] for name in ("query", "key", "value")},
    work=_strided_work,
    workloads={
        "cuda": (Case("strided, 128 steps", _SHAPES, {"block": 128, "causal": True}),),
        "cpu": (Case("strided, 64 steps", {**_SHAPES, "h": 8, "g": 8, "m": 4096, "n": 4096}, {"block": 64, "causal": True}),),
    },
    peers={"dense, causal": _dense_causal, "FlexAttention": flex(_blocks_apart)},
)


# ripple: pooled keys, linear attention, expansion


@functools.cache
def _layers(width: int, stages: int, dtype: torch.dtype, where: torch.device) -> tuple[Layer, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((width, width), (width,), (width,), (width,))
    made = ([torch.randn(shape, generator=generator).mul(width**-0.5).to(where, dtype) for shape in shapes] for _ in range(stages))
    return tuple((weight, bias, scale, shift) for weight, bias, scale, shift in made)


def _ripple(query: Tensor, key: Tensor, value: Tensor, *, rows: int, stages: int) -> Tensor:
    layers, grid = _layers(query.shape[-1], stages, query.dtype, query.device), (rows, query.shape[2] // rows)
    return ripple_attention(query, key, value, layers, layers, num_stages=stages, grid_size=grid, num_prefix_tokens=0)


def _by_torch(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def ripple(query: Tensor, key: Tensor, value: Tensor, *, rows: int, stages: int) -> Tensor:
        layers = _layers(query.shape[-1], stages, query.dtype, query.device)
        return call(query, key, value, layers, (rows, query.shape[2] // rows))

    return ripple


def _pooled(query: Tensor, key: Tensor, value: Tensor, layers: tuple[Layer, ...], grid: tuple[int, int]) -> Tensor:
    """By torch's own pooling: every cell is full, so that counts cancel."""
    for layer in layers:
        key, value = (_halved(x, grid) for x in (key, value))
        grid = (grid[0] // 2, grid[1] // 2)
        key = key + _through(key, layer)
    q, k = (FEATURES["crelu"](x) for x in (query, key))
    out: Tensor = torch.einsum("bhmf,bhfe->bhme", q, torch.einsum("bhnf,bhne->bhfe", k, value))
    out = out / (torch.einsum("bhmf,bhf->bhm", q, k.sum(2)) + 1e-6 / 4 ** len(layers)).unsqueeze(-1)
    for layer in reversed(layers):
        out = out + _through(out, layer)
    return out


def _halved(x: Tensor, grid: tuple[int, int]) -> Tensor:
    b, h, _, width = x.shape
    image = x.transpose(2, 3).reshape(b * h, width, *grid)
    pooled: Tensor = F.avg_pool2d(image, 2)
    return pooled.view(b, h, width, -1).transpose(2, 3)


def _through(x: Tensor, layer: Layer) -> Tensor:
    weight, bias, scale, shift = layer
    found: Tensor = F.gelu(F.layer_norm(F.linear(x, weight, bias), bias.shape, scale, shift))
    return found


def _ripple_work(sizes: Sizes, options: Options, itemsize: int) -> Work:
    b, h, n, d = (sizes[axis] for axis in "bhmd")
    cells = [n // 4**stage for stage in range(options["stages"] + 1)]
    products = 2 * d * d * (n + cells[-1]) + d * d * (sum(cells[1:]) + options["stages"] * n)
    return Work(flops=2.0 * b * h * products, bytes=float(itemsize * b * h * n * 4 * d))


_TOKENS = {"b": 8, "h": 8, "g": 8, "m": 8192, "n": 8192, "d": 64, "e": 64, "f": 128}
RIPPLE = replace(
    CATALOG["linear_attention"],
    name="ripple_attention",
    function=_ripple,
    kernels=_kernels("pool_tokens", "linear_attention"),
    inputs={name: CATALOG["linear_attention"].inputs[name] for name in ("query", "key", "value")},
    packed={},
    work=_ripple_work,
    workloads={
        "cuda": (Case("8k, one stage", _TOKENS, {"rows": 64, "stages": 1}),),
        "cpu": (Case("4k, three stages", {**_TOKENS, "b": 1, "m": 4096, "n": 4096}, {"rows": 64, "stages": 3}),),
    },
    peers={"pooled by torch": _by_torch(_pooled), "pooled by torch, compiled": _by_torch(torch.compile(_pooled, dynamic=False))},
)

ROWS: tuple[Mechanism, ...] = (STRIDED, RIPPLE)

__all__ = ["RIPPLE", "ROWS", "STRIDED"]
