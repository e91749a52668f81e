"""Dense, causal and cross attention: the softmax loop over one interval of keys."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from triton_attn.kernels import _softmax_launch as softmax
from triton_attn.kernels import _softmax_tiles
from triton_attn.kernels._softmax_choice import FORWARD, chosen_tile, forward_tile
from triton_attn.kernels._softmax_riders import Extras, key_of
from triton_attn.kernels._softmax_walks import FULL, Pattern, causal_from, one_run
from triton_attn.tiles import Key

POINTERS, DESCRIPTORS = "attention/pointers", "attention/descriptors"
SPACES = _softmax_tiles.by_pointers(sys.modules[__name__], dense=True)
DESCRIPTOR_SPACES = _softmax_tiles.by_descriptors(sys.modules[__name__])
FEW = 16  # rows of the smallest product


def pattern(query: Tensor, key: Tensor, causal: bool | str) -> Pattern:
    """The pattern of a call."""
    if not causal:
        return FULL
    return causal_from(key.shape[2] - query.shape[2] if causal == "bottom_right" else 0)


def grouped(query: Tensor, key: Tensor, causal: bool | str, extras: Extras) -> tuple[Tensor, bool | str, Extras]:
    """The call with the few queries of heads that share keys as rows of one head, where that is a view: a key is read once for all."""
    (b, h, m, d), g, n = query.shape, key.shape[1], key.shape[2]
    last = m == 1 and causal == "bottom_right"  # it sees every key
    # dropout counts by head and query
    if h == g or not 0 < m < FEW or (causal and not last) or extras.dropout_p or not _stacked(query):
        return query, causal, extras
    if extras.mask is not None:
        mask = extras.mask.expand(b, h, m, n)
        if not _stacked(mask):
            return query, causal, extras
        extras = replace(extras, mask=mask.view(b, g, -1, n))
    return query.view(b, g, h // g * m, d), False, replace(extras, causal=False)


def _stacked(tensor: Tensor) -> bool:
    """Whether heads and queries are one axis to the eye of a view."""
    return tensor.shape[2] == 1 or tensor.stride(1) == tensor.shape[2] * tensor.stride(2)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    seed: Tensor | None = None,
    tile: softmax.Tiles = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Forward by pointers and asynchronous copies: sm_80 and up."""
    rows, causal, extras = grouped(query, key, causal, Extras.of(query, mask, key_padding_mask, scale, dropout_p, seed, causal))
    out, lse = softmax.forward(pattern(rows, key, causal), SPACES, POINTERS, rows, key, value, extras, tile)
    return _ungrouped(out, lse, query, return_lse)


def attention_by_descriptors(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    seed: Tensor | None = None,
    tile: softmax.Tiles = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Forward by tensor descriptors (bulk copies): sm_90, rows of 16 aligned bytes, no mask and no padding."""
    rows, causal, extras = grouped(query, key, causal, Extras.of(query, mask, key_padding_mask, scale, dropout_p, seed, causal))
    walk = pattern(rows, key, causal)
    chosen = chosen_tile(tile, FORWARD, DESCRIPTOR_SPACES, DESCRIPTORS, rows, value, extras)
    if chosen.warp_specialize and causal:
        chosen = replace(chosen, warp_specialize=False)  # the compiler specialises a single loop only
    elif chosen.warp_specialize:
        walk = replace(walk, queries=(replace(walk.queries[0], runs=one_run, edges=(True,)),))
    out, lse = softmax.forward(walk, DESCRIPTOR_SPACES, DESCRIPTORS, rows, key, value, extras, chosen, descriptors=True)
    return _ungrouped(out, lse, query, return_lse)


def _ungrouped(out: Tensor, lse: Tensor, query: Tensor, return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    if out.shape[1] != query.shape[1]:
        out, lse = out.view(*query.shape[:3], out.shape[-1]), lse.view(query.shape[:3])
    return (out, lse) if return_lse else out


def attention_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    causal: bool | str = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    needs: Sequence[bool] = (True, True, True),
    tile: softmax.Tiles = None,
) -> tuple[Tensor, ...]:
    """(dQ, dK, dV) from the saved out and lse."""
    extras = Extras.of(query, mask, key_padding_mask, scale, dropout_p, seed, causal)
    grads = (grad_out, grad_lse)
    return softmax.backward(pattern(query, key, causal), SPACES, POINTERS, grads, query, key, value, out, lse, extras, needs, tile)


def tile_key(tensors: Mapping[str, Any], options: Mapping[str, Any]) -> Key:
    """What the tiles of a call depend on."""
    extras = Extras.of(
        tensors["query"], tensors["mask"], tensors["key_padding_mask"], options["scale"], options["dropout_p"], None, options["causal"]
    )
    return key_of(tensors["query"], tensors["value"], extras)


def splits(tensors: Mapping[str, Any], options: Mapping[str, Any]) -> int:
    """How many programs share the keys of a call."""
    query, key = tensors["query"], tensors["key"]
    extras = Extras.of(query, tensors["mask"], tensors["key_padding_mask"], options["scale"], options["dropout_p"], None, options["causal"])
    rows, causal, extras = grouped(query, key, options["causal"], extras)
    return forward_tile(pattern(rows, key, causal), None, SPACES, POINTERS, rows, key, tensors["value"], extras).splits
