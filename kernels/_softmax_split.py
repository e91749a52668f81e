"""Few queries, many keys: programs share the keys of a tile of queries, and a merge adds up what they leave.

Shares hold accumulator, maximum and sum, not output and log-sum-exp: the merge is then the online softmax once more, as exact as the loop.

Source: Dao, Haziza, Massa and Sizov, "Flash-Decoding for long-context inference", 2023.
"""

import triton
import triton.language as tl

from triton_attn.kernels._softmax import closed, power

AT_ONCE = 8  # shares that a merging program reads together: of 16 wide ones a few bytes spill


@triton.jit(do_not_specialize=["rows", "shares"])
def merge_kernel(
    parts_ptr,
    state_ptr,
    out_ptr,
    lse_ptr,
    rows,
    shares,
    rescale,
    MASK: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One query of one head: out and natural log-sum-exp from its shares, in their order."""
    row = tl.program_id(0)
    columns, lane = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_S)
    top = tl.max(tl.full([BLOCK_S], float("-inf"), tl.float32), 0)
    total = tl.sum(tl.zeros([BLOCK_S], tl.float32), 0)
    acc = tl.zeros([BLOCK_E], tl.float32)
    for first in tl.range(0, shares, BLOCK_S):
        inside = first + lane < shares
        at = (first + lane).to(tl.int64) * rows + row
        tops = tl.load(state_ptr + at, mask=inside, other=float("-inf"))
        totals = tl.load(state_ptr + tl.cast(shares, tl.int64) * rows + at, mask=inside, other=0.0)
        parts = tl.load(parts_ptr + at[:, None] * E + columns[None, :], mask=inside[:, None] & (columns < E)[None, :], other=0.0)
        higher = tl.maximum(top, tl.max(tops, 0))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        fade, p = power(top - finite, MASK), power(tops - finite, MASK)
        total = total * fade + tl.sum(totals * p, 0)
        acc = acc * fade + tl.sum(parts * p[:, None], 0)
        top = higher
    factor, lse = closed(top, total, rescale, MASK)
    tl.store(lse_ptr + row, lse)
    tl.store(out_ptr + row.to(tl.int64) * E + columns, (acc * factor).to(out_ptr.dtype.element_ty), mask=columns < E)
