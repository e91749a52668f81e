"""Dropout's mask in a tile: the function of (seed, batch * heads + head, query, key) that `reference/_dropout.py` defines."""

import triton
import triton.language as tl


@triton.jit
def kept(seed, head, queries, first_key, threshold, BLOCK_N: tl.constexpr):
    """Boolean (queries, BLOCK_N) for BLOCK_N consecutive keys from first_key, a multiple of four; queries is (BLOCK_M, 1)."""
    quarter = (first_key // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
    zero = tl.zeros([queries.shape[0], BLOCK_N // 4], tl.uint32)
    a, b, c, d = tl.philox(seed, zero + quarter.to(tl.uint32), zero + queries.to(tl.uint32), zero + head.to(tl.uint32), zero)
    words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    return (words >> 1).to(tl.int32) >= threshold
