"""The softmax loop, once: forward. A pattern says which rows a program owns and which runs of keys they visit.

A walk is three `@triton.jit` functions and a tuple of runtime integers, `numbers`:
- `OWNS(tile, length, numbers, BLOCK)`: the rows that a program owns, as (start, step, count);
- `RUNS(i, first, last, len_m, len_n, numbers, head, BLOCK)`: the i-th run of keys for rows first..last, likewise; count may be 0;
- `KEEP(i, m, n, numbers, head)`: the fine rule, asked only in runs that EDGES marks. Tiles of other runs are full and seen by every row.
For dK and dV a walk owns keys and its runs are of queries; there every tile may be ragged, since absent rows have lse = +inf, and
RUNS is asked once for all query heads that share the keys, with the first of them.

The online softmax simply goes on from one run into the next (FlashAttention-2, Dao 2023, section 3.1, over a union of runs).

Keys from elsewhere (EXTRA): run 0 reads another key and value tensor, whose row j stands for key `positions[j]`; NOWHERE hides it.

Few queries (SPLIT): programs along axis 1 share the keys, each takes a slice of every run, and `_softmax_split` merges what they leave.
"""

import triton
import triton.language as tl

from triton_attn.kernels._dropout import kept

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# lengths and counts change from call to call: a binary for each of their divisors would be compiled again and again
VARYING = ["heads", "group", "tiles", "len_m", "len_n", "threshold", "numbers"]
NOWHERE = tl.constexpr(2**31 - 1)
NO_MASK, BOOLEAN, ADDITIVE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def load_rows(base, positions, inside, row_stride, column_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHECK: tl.constexpr):
    """(positions, BLOCK) of a matrix: zero beyond WIDTH and, if CHECK, in rows that are not inside."""
    columns = tl.arange(0, BLOCK)
    pointers = base + positions.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    if CHECK:
        if WIDTH == BLOCK:
            return tl.load(pointers, mask=inside[:, None], other=0.0)
        else:
            return tl.load(pointers, mask=inside[:, None] & (columns < WIDTH)[None, :], other=0.0)
    else:
        if WIDTH == BLOCK:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0)


@triton.jit
def store_rows(base, positions, inside, row_stride, column_stride, tile, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse of load_rows, always checked."""
    columns = tl.arange(0, BLOCK)
    pointers = base + positions.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def hide(
    score,
    m,
    n,
    in_m,
    in_n,
    mask_base,
    mask_strides,
    numbers,
    head,
    I: tl.constexpr,
    KEEP: tl.constexpr,
    EDGE: tl.constexpr,
    CHECK: tl.constexpr,
    MASK: tl.constexpr,
):
    """Scores plus the additive mask, -inf where a query does not see a key. Queries and keys may be on either axis."""
    if MASK != NO_MASK:
        pointers = mask_base + m.to(tl.int64) * mask_strides[2] + n.to(tl.int64) * mask_strides[3]
        entry = tl.load(pointers, mask=in_m & in_n, other=0)
        if MASK == ADDITIVE:
            score = tl.where(entry == float("-inf"), float("-inf"), score + entry.to(tl.float32))
        else:
            score = tl.where(entry != 0, score, float("-inf"))
    if CHECK:
        score = tl.where(in_n, score, float("-inf"))
    if EDGE:
        if KEEP is not None:
            score = tl.where(KEEP(I, m, n, numbers, head), score, float("-inf"))
    return score


@triton.jit
def power(x, MASK: tl.constexpr):
    """e^x where a mask is added to natural scores; else 2^x, log2(e) being folded into the scale."""
    if MASK == ADDITIVE:
        return tl.exp2(x * LOG2E)
    else:
        return tl.exp2(x)


@triton.jit
def standing_for(positions_ptr, positions_strides, batch, g, n, in_n):
    """Which keys the rows n of keys from elsewhere stand for, and whether they stand for any."""
    pointers = positions_ptr + batch * positions_strides[0] + g * positions_strides[1] + n.to(tl.int64) * positions_strides[2]
    position = tl.load(pointers, mask=in_n, other=NOWHERE)
    return position, position != NOWHERE


@triton.jit
def not_padded(padding_ptr, padding_strides, batch, g, n, in_n):
    """Which of these keys the padding mask leaves."""
    pointers = padding_ptr + batch * padding_strides[0] + g * padding_strides[1] + n.to(tl.int64) * padding_strides[2]
    return in_n & (tl.load(pointers, mask=in_n, other=1) == 0)


@triton.jit
def load_extra(ptrs, strides, batch, g, j, in_n, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr):
    """Rows j of the keys and values from elsewhere, the keys that they stand for, and which of them stand for any."""
    n, in_n = standing_for(ptrs[2], strides[2], batch, g, j, in_n)
    k = load_rows(ptrs[0] + batch * strides[0][0] + g * strides[0][1], j, in_n, strides[0][2], strides[0][3], D, BLOCK_D, True)
    v = load_rows(ptrs[1] + batch * strides[1][0] + g * strides[1][1], j, in_n, strides[1][2], strides[1][3], E, BLOCK_E, True)
    return k, v, n, in_n


@triton.jit
def share(length, BLOCK: tl.constexpr):
    """The slice of a run that this program visits, from and up to, in whole tiles."""
    each = tl.cdiv(tl.cdiv(length, BLOCK), tl.num_programs(1)) * BLOCK
    begin = tl.minimum(tl.program_id(1) * each, length)
    return begin, tl.minimum(begin + each, length)


@triton.jit
def closed(top, total, rescale, MASK: tl.constexpr):
    """What the accumulator is multiplied by in the end, and the natural log-sum-exp."""
    # an empty row has acc = 0 and top = -inf already
    divisor = tl.where(total == 0.0, 1.0, total)
    if MASK == ADDITIVE:
        lse = top + tl.log(divisor)
    else:
        lse = (top + tl.log2(divisor)) * LN2
    return rescale / divisor, lse


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    extra_ptrs,
    mask_ptr,
    padding_ptr,
    end_ptr,
    seed_ptr,
    out_ptr,
    lse_ptr,
    q_strides,
    k_strides,
    v_strides,
    extra_strides,
    mask_strides,
    padding_strides,
    out_strides,
    heads,
    group,
    tiles,
    len_m,
    len_n,
    scale,
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
    SPLIT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    """One tile of queries of one head against all the keys it sees: out and natural log-sum-exp.

    SPLIT: against its share of them; `out_ptr` takes accumulators (shares, B, H, Nq, E), `lse_ptr` maxima and sums (2, shares, B, H, Nq).
    """
    # heavy causal tiles come last in a head, so they are started first
    head = tl.program_id(0) // tiles
    tile = tiles - 1 - tl.program_id(0) % tiles
    batch, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    g = h // group
    q_base = q_ptr + batch * q_strides[0] + h * q_strides[1]
    k_base = k_ptr + batch * k_strides[0] + g * k_strides[1]
    v_base = v_ptr + batch * v_strides[0] + g * v_strides[1]
    out_base = out_ptr + batch * out_strides[0] + h * out_strides[1]
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
    if DESCRIPTORS:
        q_rows = tl.make_tensor_descriptor(
            q_base + start.to(tl.int64) * q_strides[2], [count, D], [step * q_strides[2], 1], [BLOCK_M, BLOCK_D]
        )
        q = q_rows.load([0, 0])
    else:
        q = load_rows(q_base, m, in_m, q_strides[2], q_strides[3], D, BLOCK_D, True)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for i in tl.static_range(len(EDGES)):
        run, stride, length = RUNS(i, start, last, len_m, end, numbers, head % heads, BLOCK_N)
        if DESCRIPTORS:
            described = tl.maximum(length, 1)  # of an empty run nothing is read, but a descriptor has at least one row
            k_rows = tl.make_tensor_descriptor(
                k_base + tl.cast(run, tl.int64) * k_strides[2], [described, D], [stride * k_strides[2], 1], [BLOCK_N, BLOCK_D]
            )
            v_rows = tl.make_tensor_descriptor(
                v_base + tl.cast(run, tl.int64) * v_strides[2], [described, E], [stride * v_strides[2], 1], [BLOCK_N, BLOCK_E]
            )
        begin, stop = 0, length
        if SPLIT:
            begin, stop = share(length, BLOCK_N)
        for offset in tl.range(begin, stop, BLOCK_N, warp_specialize=WARP_SPECIALIZE):
            n, in_n = run + (offset + lane_n) * stride, offset + lane_n < length
            if EXTRA and i == 0:
                k, v, n, in_n = load_extra(extra_ptrs, extra_strides, batch, g, n, in_n, D, E, BLOCK_D, BLOCK_E)
            else:
                if PADDING:
                    in_n = not_padded(padding_ptr, padding_strides, batch, g, n, in_n)
                if DESCRIPTORS:
                    k = k_rows.load([offset, 0])
                    v = v_rows.load([offset, 0])
                else:
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
            higher = tl.maximum(top, tl.max(score, 1))
            # a row that has seen nothing yet has no finite maximum to subtract
            finite = tl.where(higher == float("-inf"), 0.0, higher)
            fade = power(top - finite, MASK)
            p = power(score - finite[:, None], MASK)
            total = total * fade + tl.sum(p, 1)
            if DROPOUT:
                keep = kept(seed, head, m[:, None], n[None, :], run + offset, threshold, FOURS and not (EXTRA and i == 0))
                p = tl.where(keep, p, 0.0)
            acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
            top = higher

    if SPLIT:
        parts = tl.num_programs(0) // tiles
        part = (tl.program_id(1) * parts + head).to(tl.int64) * len_m
        store_rows(out_ptr + part * E, m, in_m, E, 1, acc, E, BLOCK_E)
        tl.store(lse_ptr + part + m, top, mask=in_m)
        tl.store(lse_ptr + (tl.num_programs(1) * parts).to(tl.int64) * len_m + part + m, total, mask=in_m)
    else:
        factor, lse = closed(top, total, rescale, MASK)
        out = acc * factor[:, None]
        tl.store(lse_ptr + head.to(tl.int64) * len_m + m, lse, mask=in_m)
        if DESCRIPTORS:
            out_rows = tl.make_tensor_descriptor(
                out_base + start.to(tl.int64) * out_strides[2], [count, E], [step * out_strides[2], 1], [BLOCK_M, BLOCK_E]
            )
            out_rows.store([0, 0], out.to(out_ptr.dtype.element_ty))
        else:
            store_rows(out_base, m, in_m, out_strides[2], out_strides[3], out, E, BLOCK_E)
