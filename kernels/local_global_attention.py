"""Local-global attention: the softmax loop over the global keys and a band. Interior tiles of the band need no mask."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_attn.kernels import _softmax_launch as softmax
from triton_attn.kernels import _softmax_tiles
from triton_attn.kernels._softmax_riders import Extras, key_of
from triton_attn.kernels._softmax_walks import Elsewhere, Pattern, Walk, all_visits, causal_from, consecutive
from triton_attn.tiles import Key

# numbers: keys seen behind a query, keys seen before it, global tokens, length of run 0, how far the diagonal is shifted


@triton.jit
def local_keep(i: tl.constexpr, m, n, numbers, head):
    """Run 0 has the globals; the band leaves them out."""
    if i == 0:
        return n >= 0
    else:
        return (n >= m - numbers[0]) & (n <= m + numbers[1]) & (n >= numbers[2])


@triton.jit
def local_rows(tile, length, numbers, BLOCK: tl.constexpr):
    """The queries after the global tokens."""
    start = numbers[2] + tile * BLOCK
    return start, 1, length - start


@triton.jit
def banded(i: tl.constexpr, low, high, seen_from, seen_to, BLOCK: tl.constexpr):
    """low..high in three: tiles of which seen_from..seen_to is a part, full tiles inside of that, and the rest."""
    inner = tl.minimum(low + tl.cdiv(tl.maximum(seen_from - low, 0), BLOCK) * BLOCK, high)
    whole = tl.maximum(tl.minimum(seen_to, high) - inner, 0) // BLOCK * BLOCK
    if i == 1:
        return low, 1, inner - low
    elif i == 2:
        return inner, 1, whole
    else:
        return inner + whole, 1, high - inner - whole


@triton.jit
def local_runs(i: tl.constexpr, first, last, len_m, len_n, numbers, head, BLOCK: tl.constexpr):
    """The globals, and the band: its edges and its interior. It starts at a multiple of four, as dropout's counters do."""
    if i == 0:
        return 0, 1, numbers[3]
    else:
        low = tl.maximum(first - numbers[0], numbers[2]) // 4 * 4
        high = tl.minimum(last + numbers[1] + 1, len_n)
        return banded(i, low, high, tl.maximum(last - numbers[0], numbers[2]), first + numbers[1] + 1, BLOCK)


@triton.jit
def visit_keep(i: tl.constexpr, m, n, numbers, head):
    """Run 0 has the global queries. A global key is seen by all the others."""
    if i == 0:
        return n <= m + numbers[4]
    else:
        return (n < numbers[2]) | ((m >= n - numbers[1]) & (m <= n + numbers[0]))


@triton.jit
def local_visits(i: tl.constexpr, first, last, len_m, len_n, numbers, head, BLOCK: tl.constexpr):
    """The global queries; and those of the band, or all of them for a tile that has a global key."""
    if i == 0:
        return 0, 1, tl.minimum(numbers[2], len_m)
    else:
        everyone = first < numbers[2]
        low = tl.maximum(tl.where(everyone, 0, first - numbers[1]), numbers[2])
        high = tl.where(everyone, len_m, tl.minimum(last + numbers[0] + 1, len_m))
        return banded(i, low, high, tl.where(everyone, high, last - numbers[1]), first + numbers[0] + 1, BLOCK)


@triton.jit
def global_rows(tile, length, numbers, BLOCK: tl.constexpr):
    """The queries of the global tokens; their number follows the diagonal's shift."""
    return tile * BLOCK, 1, tl.minimum(numbers[1], length) - tile * BLOCK


POINTERS = "local_global_attention/pointers"
SPACES = _softmax_tiles.by_pointers(sys.modules[__name__])


def _after(length: int, block: int, tokens: int) -> int:
    return triton.cdiv(max(length - tokens, 0), block)


def _before(length: int, block: int, tokens: int) -> int:
    return triton.cdiv(min(length, tokens), block)


def pattern(query: Tensor, global_key: Tensor | None, global_value: Tensor | None, window: int, tokens: int, causal: bool | str) -> Pattern:
    """The pattern of a call. Global queries have a launch of their own: in one with the others they would end last."""
    n = query.shape[2]
    behind, tokens = min(window // 2, n), min(tokens, n)
    more = None
    if global_key is not None and global_value is not None:
        b, g, c = global_key.shape[:3]
        positions = torch.arange(n, n + c, dtype=torch.int32, device=query.device).expand(b, g, c)
        more = Elsewhere(global_key, global_value, positions, Walk(consecutive, all_visits, (False,), fours=False))
    numbers = (behind, 0 if causal else behind, tokens, tokens if more is None else more.key.shape[2], 0 if causal else n)
    walks = [Walk(local_rows, local_runs, (True, True, False, True), local_keep, numbers, partial(_after, tokens=tokens))]
    if tokens:
        (dense,) = (causal_from(0) if causal else causal_from(n)).queries
        walks.append(Walk(global_rows, dense.runs, dense.edges, dense.keep, (*dense.numbers, tokens), partial(_before, tokens=tokens)))
    most = n if tokens else min(n, 2 * behind + 1) + numbers[3]
    return Pattern(tuple(walks), Walk(consecutive, local_visits, (True, True, False, True), visit_keep, numbers), more, most)


def local_global_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    global_key: Tensor | None = None,
    global_value: Tensor | None = None,
    global_tokens: int = 0,
    key_padding_mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    seed: Tensor | None = None,
    tile: softmax.Tiles = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Forward by pointers and asynchronous copies: sm_80 and up."""
    walk = pattern(query, global_key, global_value, window, global_tokens, causal)
    extras = Extras.of(query, None, key_padding_mask, scale, dropout_p, seed, causal)
    out, lse = softmax.forward(walk, SPACES, POINTERS, query, key, value, extras, tile)
    return (out, lse) if return_lse else out


def local_global_attention_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    window: int,
    global_key: Tensor | None = None,
    global_value: Tensor | None = None,
    global_tokens: int = 0,
    key_padding_mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    needs: Sequence[bool] = (True, True, True, True, True),
    tile: softmax.Tiles = None,
) -> tuple[Tensor, ...]:
    """(dQ, dK, dV, and of the summaries dK and dV) from the saved out and lse."""
    walk = pattern(query, global_key, global_value, window, global_tokens, causal)
    extras = Extras.of(query, None, key_padding_mask, scale, dropout_p, seed, causal)
    return softmax.backward(walk, SPACES, POINTERS, (grad_out, grad_lse), query, key, value, out, lse, extras, needs, tile)


def tile_key(tensors: Mapping[str, Any], options: Mapping[str, Any]) -> Key:
    """What the tiles of a call depend on."""
    extras = Extras.of(
        tensors["query"], None, tensors["key_padding_mask"], options.get("scale"), options.get("dropout_p", 0.0), None, options["causal"]
    )
    return key_of(tensors["query"], tensors["value"], extras)
