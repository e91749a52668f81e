"""Which tile a launch of the softmax loop gets, and how many programs share the keys of a tile of queries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import triton
from torch import Tensor

from triton_attn import device
from triton_attn import tiles as tables
from triton_attn.kernels._softmax_riders import Extras, key_of
from triton_attn.kernels._softmax_walks import Pattern
from triton_attn.tiles import Space, Tile, Tiles

FORWARD, SPLIT, BACKWARD_QUERY, BACKWARD_KEY = "forward", "split", "backward_query", "backward_key"
FEWEST_KEYS = 128  # of a share: with fewer, leaving and merging it costs what it saves


def forward_tile(
    pattern: Pattern, tile: Tiles, spaces: Mapping[str, Space], name: str, query: Tensor, key_: Tensor, value: Tensor, extras: Extras
) -> Tile:
    """The forward launch's tile: that of the split launch, with its number of splits, where it was asked for or the grid is too small."""
    asked = tile.get(SPLIT) if isinstance(tile, Mapping) else None
    if asked is not None:
        return replace(asked, splits=max(2, asked.splits))
    chosen = chosen_tile(tile, FORWARD, spaces, name, query, value, extras)
    if tile is not None or SPLIT not in spaces or not idle(query, _programs(pattern, query, chosen)):
        return chosen
    few = chosen_tile(None, SPLIT, spaces, name, query, value, extras)
    keys = key_.shape[2] if pattern.most is None else pattern.most
    shares = share_count(query, _programs(pattern, query, few), keys, few.block_n)
    return replace(few, splits=shares) if shares > 1 else chosen


def _programs(pattern: Pattern, query: Tensor, tile: Tile) -> int:
    b, h, m = query.shape[:3]
    return b * h * sum(walk.tiles(m, tile.block_m) for walk in pattern.queries)


def chosen_tile(tile: Tiles, launch: str, spaces: Mapping[str, Space], name: str, query: Tensor, value: Tensor, extras: Extras) -> Tile:
    """The tile asked for, or the one that tables have for this call."""
    return tables.chosen_tile(tile, launch, spaces, name, key_of(query, value, extras), query)


def idle(query: Tensor, programs: int) -> bool:
    """Whether so few programs leave half of the GPU's multiprocessors without one."""
    return query.is_cuda and 2 * programs <= device.profile(query.device.index).multiprocessors


def share_count(query: Tensor, programs: int, keys: int, block_n: int) -> int:
    """Over how many programs the keys are spread: two for each multiprocessor. From sizes alone: the same call gives the same bits."""
    wanted = min(2 * device.profile(query.device.index).multiprocessors // max(programs, 1), keys // FEWEST_KEYS)
    if wanted < 2:
        return 1
    tiles = triton.cdiv(keys, block_n)
    return triton.cdiv(tiles, triton.cdiv(tiles, wanted))  # no share is empty
