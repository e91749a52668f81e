"""The softmax loop, once: backward. One kernel owns queries and gives dQ, one owns keys and gives dK and dV; no atomics.

dS = P (dP - delta) with delta = rowsum(out dout) - dlse, the only place where the gradient of lse enters. Products that would
need a transposed result are computed transposed instead: `tl.dot(tl.trans(x), y)` of a dot's result x is miscompiled on Hopper
by some Triton versions (flash-linear-attention pull request 826).
"""

import triton
import triton.language as tl

from triton_attn.kernels._dropout import kept
from triton_attn.kernels._softmax import (
    ADDITIVE,
    LOG2E,
    NO_MASK,
    VARYING,
    hide,
    load_extra,
    load_rows,
    not_padded,
    power,
    standing_for,
    store_rows,
)


@triton.jit(do_not_specialize=["heads", "tiles", "len_m"])
def delta_kernel(
    out_ptr,
    grad_ptr,
    grad_lse_ptr,
    delta_ptr,
    out_strides,
    grad_strides,
    grad_lse_strides,
    heads,
    tiles,
    len_m,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta = rowsum(out dout) - dlse."""
    head = tl.program_id(0) // tiles
    batch, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    m = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = m < len_m
    out = load_rows(out_ptr + batch * out_strides[0] + h * out_strides[1], m, in_m, out_strides[2], out_strides[3], E, BLOCK_E, True)
    grad = load_rows(grad_ptr + batch * grad_strides[0] + h * grad_strides[1], m, in_m, grad_strides[2], grad_strides[3], E, BLOCK_E, True)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    if grad_lse_ptr is not None:
        pointers = grad_lse_ptr + batch * grad_lse_strides[0] + h * grad_lse_strides[1] + m.to(tl.int64) * grad_lse_strides[2]
        delta -= tl.load(pointers, mask=in_m, other=0.0).to(tl.float32)
    tl.store(delta_ptr + head.to(tl.int64) * len_m + m, delta, mask=in_m)


@triton.jit
def load_lse(lse_ptr, head, len_m, m, in_m, MASK: tl.constexpr):
    """lse in the unit of the scores; +inf, which makes every weight 0, for rows that see nothing."""
    lse = tl.load(lse_ptr + head.to(tl.int64) * len_m + m, mask=in_m, other=float("inf"))
    if MASK != ADDITIVE:
        lse *= LOG2E
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit(do_not_specialize=VARYING)
def backward_query_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    extra_ptrs,
    mask_ptr,
    padding_ptr,
    end_ptr,
    seed_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    q_strides,
    k_strides,
    v_strides,
    extra_strides,
    mask_strides,
    padding_strides,
    grad_strides,
    dq_strides,
    heads,
    group,
    tiles,
    len_m,
    len_n,
    scale,
    natural_scale,
    threshold,
    rescale,
    numbers,
    OWNS: tl.constexpr,
    RUNS: tl.constexpr,
    KEEP: tl.constexpr,
    EDGES: tl.constexpr,
    FOURS: tl.constexpr,
    EXTRA: tl.constexpr,
    MASK: tl.constexpr,
    PADDING: tl.constexpr,
    DROPOUT: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dQ = scale dS K for one tile of queries."""
    head = tl.program_id(0) // tiles
    tile = tiles - 1 - tl.program_id(0) % tiles
    batch, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    g = h // group
    k_base = k_ptr + batch * k_strides[0] + g * k_strides[1]
    v_base = v_ptr + batch * v_strides[0] + g * v_strides[1]
    mask_base = mask_ptr
    if MASK != NO_MASK:
        mask_base += batch * mask_strides[0] + h * mask_strides[1]
    end = len_n
    if PADDING:
        end = tl.load(end_ptr + batch)
    if DROPOUT:
        seed = tl.load(seed_ptr)

    start, step, count = OWNS(tile, len_m, numbers, BLOCK_M)
    lane_m, lane_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    m, in_m = start + lane_m * step, lane_m < count
    last = start + (tl.minimum(count, BLOCK_M) - 1) * step
    q = load_rows(q_ptr + batch * q_strides[0] + h * q_strides[1], m, in_m, q_strides[2], q_strides[3], D, BLOCK_D, True)
    grad = load_rows(grad_ptr + batch * grad_strides[0] + h * grad_strides[1], m, in_m, grad_strides[2], grad_strides[3], E, BLOCK_E, True)
    lse = load_lse(lse_ptr, head, len_m, m, in_m, MASK)
    delta = tl.load(delta_ptr + head.to(tl.int64) * len_m + m, mask=in_m, other=0.0)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in tl.static_range(len(EDGES)):
        run, stride, length = RUNS(i, start, last, len_m, end, numbers, head % heads, BLOCK_N)
        for offset in tl.range(0, length, BLOCK_N):
            n, in_n = run + (offset + lane_n) * stride, offset + lane_n < length
            if EXTRA and i == 0:
                k, v, n, in_n = load_extra(extra_ptrs, extra_strides, batch, g, n, in_n, D, E, BLOCK_D, BLOCK_E)
            else:
                if PADDING:
                    in_n = not_padded(padding_ptr, padding_strides, batch, g, n, in_n)
                k = load_rows(k_base, n, in_n, k_strides[2], k_strides[3], D, BLOCK_D, EDGES[i] or PADDING)
                v = load_rows(v_base, n, in_n, v_strides[2], v_strides[3], E, BLOCK_E, EDGES[i] or PADDING)
            score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            score = hide(
                score,
                m[:, None],
                n[None, :],
                in_m[:, None],
                in_n[None, :],
                mask_base,
                mask_strides,
                numbers,
                head % heads,
                i,
                KEEP,
                EDGES[i],
                EDGES[i] or PADDING,
                MASK,
            )
            p = power(score - lse[:, None], MASK)
            dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            if DROPOUT:
                keep = kept(seed, head, m[:, None], n[None, :], run + offset, threshold, FOURS and not (EXTRA and i == 0))
                dp = tl.where(keep, dp * rescale, 0.0)
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    store_rows(dq_ptr + batch * dq_strides[0] + h * dq_strides[1], m, in_m, dq_strides[2], dq_strides[3], dq * natural_scale, D, BLOCK_D)


@triton.jit(do_not_specialize=VARYING)
def backward_key_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    positions_ptr,
    mask_ptr,
    padding_ptr,
    seed_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    q_strides,
    k_strides,
    v_strides,
    positions_strides,
    mask_strides,
    padding_strides,
    grad_strides,
    dk_strides,
    dv_strides,
    heads,
    group,
    tiles,
    len_m,
    len_n,
    scale,
    natural_scale,
    threshold,
    rescale,
    numbers,
    OWNS: tl.constexpr,
    RUNS: tl.constexpr,
    KEEP: tl.constexpr,
    EDGES: tl.constexpr,
    FOURS: tl.constexpr,
    SCATTER: tl.constexpr,
    MASK: tl.constexpr,
    PADDING: tl.constexpr,
    DROPOUT: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dK = scale dS^T Q and dV = P^T dO of a tile of keys, over the query heads that share them. SCATTER: stored where they stand."""
    shared = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    groups = heads // group
    batch, g = (shared // groups).to(tl.int64), (shared % groups).to(tl.int64)
    if DROPOUT:
        seed = tl.load(seed_ptr)

    start, step, count = OWNS(tile, len_n, numbers, BLOCK_N)
    lane_m, lane_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    j, in_n = start + lane_n * step, lane_n < count
    n, stored = j, in_n
    if positions_ptr is not None:
        n, in_n = standing_for(positions_ptr, positions_strides, batch, g, j, in_n)
        first, last = tl.min(tl.where(in_n, n, len_n)), tl.max(tl.where(in_n, n, -1))
        if SCATTER:
            stored = in_n
    else:
        first, last = start, start + (tl.minimum(count, BLOCK_N) - 1) * step
    if PADDING:
        in_n = not_padded(padding_ptr, padding_strides, batch, g, n, in_n)
    k = load_rows(k_ptr + batch * k_strides[0] + g * k_strides[1], j, in_n, k_strides[2], k_strides[3], D, BLOCK_D, True)
    v = load_rows(v_ptr + batch * v_strides[0] + g * v_strides[1], j, in_n, v_strides[2], v_strides[3], E, BLOCK_E, True)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    q_base = q_ptr + batch * q_strides[0]
    grad_base = grad_ptr + batch * grad_strides[0]
    for i in tl.static_range(len(EDGES)):
        run, stride, length = RUNS(i, first, last, len_m, len_n, numbers, shared % groups * group, BLOCK_M)
        # one loop over heads and tiles: a nested one costs a quarter of the registers
        steps = tl.cdiv(length, BLOCK_M)
        for turn in tl.range(0, group * steps):
            h = g * group + turn // steps
            offset = turn % steps * BLOCK_M
            head = (batch * heads + h).to(tl.int32)
            m, in_m = run + (offset + lane_m) * stride, offset + lane_m < length
            q = load_rows(q_base + h * q_strides[1], m, in_m, q_strides[2], q_strides[3], D, BLOCK_D, True)
            grad = load_rows(grad_base + h * grad_strides[1], m, in_m, grad_strides[2], grad_strides[3], E, BLOCK_E, True)
            lse = load_lse(lse_ptr, head, len_m, m, in_m, MASK)
            delta = tl.load(delta_ptr + head.to(tl.int64) * len_m + m, mask=in_m, other=0.0)
            score = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
            mask_base = mask_ptr
            if MASK != NO_MASK:
                mask_base += batch * mask_strides[0] + h * mask_strides[1]
            score = hide(
                score,
                m[None, :],
                n[:, None],
                in_m[None, :],
                in_n[:, None],
                mask_base,
                mask_strides,
                numbers,
                h.to(tl.int32),
                i,
                KEEP,
                EDGES[i],
                PADDING or positions_ptr is not None,
                MASK,
            )
            p = power(score - lse[None, :], MASK)
            dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
            if DROPOUT:
                keep = tl.trans(kept(seed, head, m[:, None], n[None, :], start, threshold, FOURS))
                dp = tl.where(keep, dp * rescale, 0.0)
                dv = tl.dot(tl.where(keep, p * rescale, 0.0).to(grad.dtype), grad, dv, input_precision=PRECISION)
            else:
                dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    row = n if SCATTER else j
    store_rows(
        dk_ptr + batch * dk_strides[0] + g * dk_strides[1], row, stored, dk_strides[2], dk_strides[3], dk * natural_scale, D, BLOCK_D
    )
    store_rows(dv_ptr + batch * dv_strides[0] + g * dv_strides[1], row, stored, dv_strides[2], dv_strides[3], dv, E, BLOCK_E)
