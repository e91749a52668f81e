"""Hypothesis strategies: sizes biased to the edges of tiles, dtypes, layouts, spreads, and calls of a catalogue row.

What they draw shrinks to small, readable cases: values come from a `torch.Generator` that a drawn seed feeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from hypothesis import strategies as st

from triton_attn.mechanism import Case, Mechanism
from triton_attn.testing import inputs
from triton_attn.tiles import Tile

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDTHS = (1, 8, 15, 16, 17, 24, 32, 40)


def edges(smallest: int = 1, largest: int = 48, tile: int = 16) -> st.SearchStrategy[int]:
    """Sizes of which many lie at the ends, on a multiple of `tile`, or one beside it."""
    near = {smallest, smallest + 1, largest, *(size + step for size in range(tile, largest + 1, tile) for step in (-1, 0, 1))}
    # integers first: failures shrink to the first alternative
    return st.integers(smallest, largest) | st.sampled_from(sorted(size for size in near if smallest <= size <= largest))


def dtypes(among: Sequence[torch.dtype] = DTYPES) -> st.SearchStrategy[torch.dtype]:
    """Dtypes of tensors; failures shrink to float32 if it is among them, else to the first."""
    return st.sampled_from(sorted(among, key=lambda dtype: dtype != torch.float32))


lengths = edges(0)
widths = st.sampled_from(WIDTHS)
layouts = st.sampled_from(inputs.LAYOUTS)
spreads = st.sampled_from((0.1, 1.0, 8.0))
seeds = st.integers(0, 2**16)
tiles = st.builds(Tile, st.sampled_from((16, 32)), st.sampled_from((16, 32)), st.just(4), st.just(1), splits=st.integers(1, 3))


@st.composite
def cases(draw: st.DrawFn, row: Mechanism) -> Case:
    """A case with the options of one of the row's own, and other sizes."""
    template = draw(st.sampled_from(row.cases))
    groups, members = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    few = {"b": st.integers(1, 2), "h": st.just(groups * members), "g": st.just(groups), "d": widths, "e": widths}
    few |= {axis: st.sampled_from(sizes) for axis, sizes in row.draws.items()}
    sizes = {axis: draw(few.get(axis, lengths)) for axis in template.sizes}
    return replace(template, sizes=row.fitted(sizes, template.options))
