"""What random features are, the levels of lines, and what is summed of them over spans: see `_favor_walks`."""

import triton
import triton.language as tl

from triton_attn.kernels._carried import head_place, narrowed

VARYING = ["heads", "group", "groups", "blocks", "spans", "span", "len_x", "len_y", "features", "count", "columns"]
NEGATIVE = tl.constexpr(-float("inf"))


@triton.jit
def load_tile(base, lines, inside, strides, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """(lines, PADDED) in float32."""
    columns = tl.arange(0, PADDED)
    there = inside[:, None] & (columns < WIDTH)[None, :]
    places = lines.to(tl.int64)[:, None] * strides[2] + columns.to(tl.int64)[None, :] * strides[3]
    return tl.load(base + places, mask=there, other=0.0).to(tl.float32)


@triton.jit
def load_projection(w_ptr, rows, there, strides, WIDTH: tl.constexpr, PADDED: tl.constexpr, LIKE: tl.constexpr):
    """Some rows of W, as precise as products of tf32 are: what is lost here moves an exponent."""
    columns = tl.arange(0, PADDED)
    mask = there[:, None] & (columns < WIDTH)[None, :]
    w = tl.load(w_ptr + rows[:, None] * strides[0] + columns.to(tl.int64)[None, :] * strides[1], mask=mask, other=0.0)
    if LIKE == tl.bfloat16:
        return narrowed(w, tl.float16)
    else:
        return narrowed(w, LIKE)


@triton.jit
def powers(x, w, there, largest, root, EXPONENT: tl.constexpr):
    """e^(W x - largest), zero where there is no feature."""
    exponents = tl.dot(x, tl.trans(w), input_precision=EXPONENT) * root
    return tl.where(there[None, :], tl.exp(exponents - largest[:, None]), 0.0)


@triton.jit
def phi(x, w, there, largest, root, epsilon, EXPONENT: tl.constexpr, LIKE: tl.constexpr):
    """Features as operands of a product."""
    return narrowed(powers(x, w, there, largest, root, EXPONENT) + tl.where(there[None, :], epsilon, 0.0), LIKE)


@triton.jit
def safe(level):
    """A level to subtract: where nothing has been seen yet, any."""
    return tl.where(level == NEGATIVE, 0.0, level)


@triton.jit(do_not_specialize=VARYING)
def level_kernel(
    x_ptr,
    w_ptr,
    padding_ptr,
    largest_ptr,
    level_ptr,
    x_strides,
    w_strides,
    padding_strides,
    heads,
    blocks,
    len_x,
    features,
    root,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK: tl.constexpr,
    LIKE: tl.constexpr,
    EXPONENT: tl.constexpr,
):
    """The largest exponent of each line; and with `level_ptr` its level, -inf for lines that are hidden."""
    pair, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    batch, head = (pair // heads).to(tl.int64), pair % heads
    lines = block * BLOCK + tl.arange(0, BLOCK)
    inside = lines < len_x
    shown = inside
    if padding_ptr is not None:
        at = padding_ptr + batch * padding_strides[0] + lines.to(tl.int64) * padding_strides[1]
        shown = tl.load(at, mask=inside, other=1) == 0
    x = load_tile(x_ptr + head_place(batch, head, 1, x_strides), lines, shown, x_strides, WIDTH, PADDED)
    largest = tl.full((BLOCK,), NEGATIVE, tl.float32)
    for first in range(0, features, BLOCK_F):
        rows = (first + tl.arange(0, BLOCK_F)).to(tl.int64)
        w = load_projection(w_ptr, rows, rows < features, w_strides, WIDTH, PADDED, LIKE)
        exponents = tl.dot(x, tl.trans(w), input_precision=EXPONENT) * root
        largest = tl.maximum(largest, tl.max(tl.where((rows < features)[None, :], exponents, NEGATIVE), 1))
    cells = pair.to(tl.int64) * len_x + lines
    tl.store(largest_ptr + cells, largest, mask=inside)
    if level_ptr is not None:
        level = largest - 0.5 * root * root * tl.sum(x * x, 1)
        tl.store(level_ptr + cells, tl.where(shown, level, NEGATIVE), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def sum_kernel(
    y_ptr,
    z_ptr,
    w_ptr,
    largest_ptr,
    level_ptr,
    factor_ptr,
    weight_ptr,
    end_ptr,
    state_ptr,
    side_ptr,
    y_strides,
    z_strides,
    w_strides,
    heads,
    group,
    blocks,
    spans,
    span,
    len_y,
    features,
    root,
    epsilon,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    WIDTH_Z: tl.constexpr,
    PADDED_Z: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
    LIKE: tl.constexpr,
    PRECISION: tl.constexpr,
    EXPONENT: tl.constexpr,
):
    """sum_s e^(level_s - end) phi(y_s)^T z_s over each span, into (spans, B heads, features, columns of z), and the weighed sum of phi."""
    program = tl.program_id(0)
    at_span, block, pair = program % spans, program // spans % blocks, program // spans // blocks
    batch, head = (pair // heads).to(tl.int64), pair % heads
    y_base = y_ptr + head_place(batch, head, 1, y_strides)
    z_base = z_ptr + head_place(batch, head, 1, z_strides)
    row = pair.to(tl.int64) * len_y
    shared = pair // group
    pairs = tl.num_programs(0) // spans // blocks
    end = safe(tl.load(end_ptr + at_span * (pairs // group) + shared))
    rows = (block * BLOCK_F + tl.arange(0, BLOCK_F)).to(tl.int64)
    there = rows < features
    w = load_projection(w_ptr, rows, there, w_strides, WIDTH, PADDED, LIKE)
    state = tl.zeros((BLOCK_F, PADDED_Z), tl.float32)
    side = tl.zeros((BLOCK_F,), tl.float32)
    for start in range(at_span * span, tl.minimum(at_span * span + span, len_y), BLOCK):
        lines = start + tl.arange(0, BLOCK)
        if REVERSE:
            lines = len_y - 1 - lines
        inside = (lines >= 0) & (lines < len_y)
        level = tl.load(level_ptr + shared.to(tl.int64) * len_y + lines, mask=inside, other=NEGATIVE)
        shown = (level == NEGATIVE) == 0
        largest = tl.load(largest_ptr + row + lines, mask=inside, other=0.0)
        y = load_tile(y_base, lines, shown, y_strides, WIDTH, PADDED)
        z = load_tile(z_base, lines, shown, z_strides, WIDTH_Z, PADDED_Z)
        grown = tl.exp(level - end)
        weight = grown
        if factor_ptr is not None:
            z *= tl.load(factor_ptr + row + lines, mask=inside, other=0.0)[:, None]
            weight *= tl.load(weight_ptr + row + lines, mask=inside, other=0.0)
        y = phi(y, w, there, largest, root, epsilon, EXPONENT, LIKE)
        state = tl.dot(tl.trans(y), narrowed(z * grown[:, None], LIKE), state, input_precision=PRECISION)
        side += tl.sum(y.to(tl.float32) * weight[:, None], 0)
    columns = tl.arange(0, PADDED_Z)
    cell = (at_span.to(tl.int64) * pairs + pair) * features + rows
    mask = there[:, None] & (columns < WIDTH_Z)[None, :]
    tl.store(state_ptr + cell[:, None] * WIDTH_Z + columns[None, :], state, mask=mask)
    tl.store(side_ptr + cell, side, mask=there)


@triton.jit(do_not_specialize=VARYING)
def prefix_kernel(
    state_ptr, initial_ptr, total_ptr, decay_ptr, initial_strides, heads, groups, blocks, spans, count, columns, BLOCK: tl.constexpr
):
    """In place, what precedes each span, relative to the level there; and the sum of all. One head of each group has an initial state."""
    pair, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    batch, head = (pair // heads).to(tl.int64), pair % heads
    places = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = places < count
    running = tl.zeros((BLOCK,), tl.float32)
    if initial_ptr is not None:
        if head % groups == 0:
            base = initial_ptr + batch * initial_strides[0] + (head // groups).to(tl.int64) * initial_strides[1]
            cells = base + places // columns * initial_strides[2] + places % columns * initial_strides[3]
            running = tl.load(cells, mask=inside, other=0.0).to(tl.float32)
    pairs = tl.num_programs(0) // blocks
    spot = state_ptr + pair.to(tl.int64) * count + places
    decay = decay_ptr + pair // groups
    for _ in range(spans):
        part = tl.load(spot, mask=inside, other=0.0)
        tl.store(spot, running, mask=inside)
        running = running * tl.load(decay) + part
        spot += pairs.to(tl.int64) * count
        decay += pairs // groups
    tl.store(total_ptr + pair.to(tl.int64) * count + places, running, mask=inside)
