"""Dropout's mask in a tile: the function of (seed, batch * heads + head, query, key) that `reference/_dropout.py` defines."""

import triton
import triton.language as tl


@triton.jit
def kept(seed, head, queries, keys, first, threshold, FOURS: tl.constexpr):
    """Boolean (queries, keys) for queries (BLOCK_M, 1) and keys (1, BLOCK_N).

    FOURS: the keys are consecutive from `first`, a multiple of four, so that one counter serves four of them.
    """
    BLOCK_N: tl.constexpr = keys.shape[1]
    if FOURS:
        quarter = (first // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
        zero = tl.zeros([queries.shape[0], BLOCK_N // 4], tl.uint32)
        a, b, c, d = tl.philox(seed, zero + quarter.to(tl.uint32), zero + queries.to(tl.uint32), zero + head.to(tl.uint32), zero)
        words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    else:
        zero = tl.zeros([queries.shape[0], BLOCK_N], tl.uint32)
        a, b, c, d = tl.philox(seed, zero + (keys // 4).to(tl.uint32), zero + queries.to(tl.uint32), zero + head.to(tl.uint32), zero)
        words = tl.where(keys % 4 < 2, tl.where(keys % 4 == 0, a, b), tl.where(keys % 4 == 2, c, d))
    return (words >> 1).to(tl.int32) >= threshold
