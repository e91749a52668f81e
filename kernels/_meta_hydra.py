"""Hydra attention with a head for each feature: running sums of u(k) * v, which every branch of queries is multiplied by.

u(x) = x / |x|. A program owns one span of time of one head, as wide as its features; `_carried_launch.prefix` makes the sums before the
spans. Backwards the same sums are of u(q) * dO over all branches, walked from the end.

| computes | x | sums of |
|---|---|---|
| out | q | u(k) * v |
| dq, through w = dO * sums | q | u(k) * v |
| dv = u(k) * sums, dk through w = v * sums, backwards in time | k | u(q) * dO over all branches |

Through w: dx = (w - u <u, w>) / |x|.
"""

import triton
import triton.language as tl

from triton_attn.kernels._carried import head_place, visible
from triton_attn.kernels._favor import load_tile

VARYING = ["heads", "members", "spans", "span", "step", "length"]


@triton.jit
def unit(x):
    """(x / |x|, 1 / |x|) of each line, zero for a line of zeros."""
    square = tl.sum(x * x, 1)
    inverse = tl.where(square > 0.0, 1.0 / tl.sqrt(square), 0.0)
    return x * inverse[:, None], inverse


@triton.jit
def through_unit(asked, u, inverse):
    """The gradient of x, where `asked` is that of u(x)."""
    return (asked - u * tl.sum(u * asked, 1)[:, None]) * inverse[:, None]


@triton.jit
def products(x_ptr, z_ptr, batch, head, members, lines, inside, x_strides, z_strides, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """The sum of u(x) * z of each line over the members of a head."""
    summed = tl.zeros((lines.shape[0], PADDED), tl.float32)
    for member in range(members):
        one = head * members + member
        x = load_tile(x_ptr + head_place(batch, one, members, x_strides), lines, inside, x_strides, WIDTH, PADDED)
        z = load_tile(z_ptr + head_place(batch, one, members, z_strides), lines, inside, z_strides, WIDTH, PADDED)
        x, _ = unit(x)
        summed += x * z
    return summed


@triton.jit
def lines_of(start, length, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
    """The lines at some times, and which of them exist."""
    lines = (start + tl.arange(0, BLOCK)).to(tl.int64)
    if REVERSE:
        lines = length - 1 - lines
    return lines, (lines >= 0) & (lines < length)


@triton.jit(do_not_specialize=VARYING)
def sum_kernel(
    x_ptr,
    z_ptr,
    padding_ptr,
    sums_ptr,
    x_strides,
    z_strides,
    padding_strides,
    heads,
    members,
    spans,
    span,
    length,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """The sum of products over each span, into (spans, B heads, WIDTH)."""
    at_span, pair = tl.program_id(0) % spans, tl.program_id(0) // spans
    batch, head = (pair // heads).to(tl.int64), pair % heads
    total = tl.zeros((PADDED,), tl.float32)
    for start in range(at_span * span, tl.minimum(at_span * span + span, length), BLOCK):
        lines, inside = lines_of(start, length, BLOCK, REVERSE)
        shown = visible(padding_ptr, batch, lines, inside, padding_strides, padding_ptr is not None)
        total += tl.sum(products(x_ptr, z_ptr, batch, head, members, lines, shown, x_strides, z_strides, WIDTH, PADDED), 0)
    columns = tl.arange(0, PADDED)
    cell = at_span.to(tl.int64) * (tl.num_programs(0) // spans) + pair
    tl.store(sums_ptr + cell * WIDTH + columns, total, mask=columns < WIDTH)


@triton.jit(do_not_specialize=VARYING)
def query_kernel(
    x_ptr,
    y_ptr,
    z_ptr,
    grad_ptr,
    padding_ptr,
    before_ptr,
    out_ptr,
    x_strides,
    y_strides,
    z_strides,
    grad_strides,
    out_strides,
    padding_strides,
    heads,
    members,
    spans,
    span,
    step,
    length,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """u(x) * sums for every member; with `grad_ptr` the gradient of x."""
    at_span, pair = tl.program_id(0) % spans, tl.program_id(0) // spans
    batch, head = (pair // heads).to(tl.int64), pair % heads
    columns = tl.arange(0, PADDED)
    cell = at_span.to(tl.int64) * step + pair
    total = tl.load(before_ptr + cell * WIDTH + columns, mask=columns < WIDTH, other=0.0)
    for start in range(at_span * span, tl.minimum(at_span * span + span, length), BLOCK):
        lines, inside = lines_of(start, length, BLOCK, False)
        seen = total[None, :]
        if CAUSAL:
            shown = visible(padding_ptr, batch, lines, inside, padding_strides, padding_ptr is not None)
            more = products(y_ptr, z_ptr, batch, head, 1, lines, shown, y_strides, z_strides, WIDTH, PADDED)
            seen += tl.cumsum(more, 0)
            total += tl.sum(more, 0)
        for member in range(members):
            one = head * members + member
            x, inverse = unit(load_tile(x_ptr + head_place(batch, one, members, x_strides), lines, inside, x_strides, WIDTH, PADDED))
            if grad_ptr is None:
                out = x * seen
            else:
                grad = load_tile(grad_ptr + head_place(batch, one, members, grad_strides), lines, inside, grad_strides, WIDTH, PADDED)
                out = through_unit(grad * seen, x, inverse)
            spots = head_place(batch, one, members, out_strides) + lines[:, None] * out_strides[2] + columns[None, :] * out_strides[3]
            tl.store(out_ptr + spots, out.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (columns < WIDTH)[None, :])


@triton.jit(do_not_specialize=VARYING)
def key_kernel(
    x_ptr,
    y_ptr,
    z_ptr,
    value_ptr,
    padding_ptr,
    before_ptr,
    grad_x_ptr,
    grad_value_ptr,
    x_strides,
    y_strides,
    z_strides,
    value_strides,
    padding_strides,
    heads,
    members,
    spans,
    span,
    step,
    length,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """The gradients of keys x and of values, from the end to the start: y are queries, z what their outputs are asked for."""
    at_span, pair = tl.program_id(0) % spans, tl.program_id(0) // spans
    batch, head = (pair // heads).to(tl.int64), pair % heads
    columns = tl.arange(0, PADDED)
    cell = at_span.to(tl.int64) * step + pair
    total = tl.load(before_ptr + cell * WIDTH + columns, mask=columns < WIDTH, other=0.0)
    for start in range(at_span * span, tl.minimum(at_span * span + span, length), BLOCK):
        lines, inside = lines_of(start, length, BLOCK, CAUSAL)
        asked = total[None, :]
        if CAUSAL:
            more = products(y_ptr, z_ptr, batch, head, members, lines, inside, y_strides, z_strides, WIDTH, PADDED)
            asked += tl.cumsum(more, 0)
            total += tl.sum(more, 0)
        # what is hidden is read as zeros, and so is its gradient
        shown = visible(padding_ptr, batch, lines, inside, padding_strides, padding_ptr is not None)
        x, inverse = unit(load_tile(x_ptr + head_place(batch, head, 1, x_strides), lines, shown, x_strides, WIDTH, PADDED))
        spots = (pair.to(tl.int64) * length + lines[:, None]) * WIDTH + columns[None, :]
        written = inside[:, None] & (columns < WIDTH)[None, :]
        if grad_value_ptr is not None:
            tl.store(grad_value_ptr + spots, (x * asked).to(grad_value_ptr.dtype.element_ty), mask=written)
        if grad_x_ptr is not None:
            value = load_tile(value_ptr + head_place(batch, head, 1, value_strides), lines, shown, value_strides, WIDTH, PADDED)
            out = through_unit(value * asked, x, inverse)
            tl.store(grad_x_ptr + spots, out.to(grad_x_ptr.dtype.element_ty), mask=written)
