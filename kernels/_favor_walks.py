"""FAVOR+ on one carried state that knows its own logarithm: sums over s <= t of e^(level_s - level_t) phi(x_t) phi(y_s)^T z_s.

phi(x)_f = e^(w_f.x - largest(x)) + epsilon is computed on load from a block of the projection's rows and never written. A line's level is
the logarithm of what its features were divided by: of keys m = largest - scale |k|^2 / 2, of queries M, the largest m that they see.

| computes | x | y | z | levels of x and y |
|---|---|---|---|---|
| out | phi(q) | phi(k) | v | M, m |
| dv, backwards in time | phi(k) | phi(q) | dN | -m, -M |
| d phi(q) | dN | v | phi(k) | M, m |
| d phi(k), backwards in time | v | dN | phi(q) | -m, -M |

N and D being numerator and denominator, dN = dO / D. No y that an x sees has a larger level, in either direction, so no power of e exceeds
one. States are relative to the largest level so far, `at`. A program owns one span of time and goes through it once for each BLOCK_F
features, adding to its own lines: registers hold a state of any number of features.
Running maximum: Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory", 2021, carried over to features.
"""

import triton
import triton.language as tl

from triton_attn.kernels._carried import head_place, narrowed
from triton_attn.kernels._favor import NEGATIVE, VARYING, load_projection, load_tile, phi, powers, safe


@triton.jit(do_not_specialize=VARYING)
def out_kernel(
    x_ptr,
    y_ptr,
    z_ptr,
    w_ptr,
    x_largest_ptr,
    y_largest_ptr,
    x_level_ptr,
    y_level_ptr,
    factor_ptr,
    before_ptr,
    state_ptr,
    side_ptr,
    out_ptr,
    partial_ptr,
    bottom_ptr,
    x_strides,
    y_strides,
    z_strides,
    w_strides,
    state_strides,
    side_strides,
    heads,
    groups,
    spans,
    span,
    len_x,
    len_y,
    features,
    root,
    epsilon,
    eps,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    WIDTH_Z: tl.constexpr,
    PADDED_Z: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    REVERSE: tl.constexpr,
    LIKE: tl.constexpr,
    PRECISION: tl.constexpr,
    EXPONENT: tl.constexpr,
):
    """The outputs of one span from the state before it: with `bottom_ptr` divided by their denominators, which are kept there."""
    program = tl.program_id(0)
    at_span, pair = program % spans, program // spans
    batch, head = (pair // heads).to(tl.int64), pair % heads
    x_base = x_ptr + head_place(batch, head, groups[0], x_strides)
    y_base = y_ptr + head_place(batch, head, groups[1], y_strides)
    z_base = z_ptr + head_place(batch, head, groups[2], z_strides)
    x_row, y_row = (pair // groups[0]).to(tl.int64) * len_x, (pair // groups[1]).to(tl.int64) * len_y
    shared, own = (pair // groups[3]).to(tl.int64), pair.to(tl.int64)
    shares = tl.num_programs(0) // spans // groups[3]
    state_head = (head // groups[4]).to(tl.int64)
    state_base = state_ptr + at_span.to(tl.int64) * state_strides[0] + batch * state_strides[1] + state_head * state_strides[2]
    columns = tl.arange(0, PADDED_Z)
    wanted = (columns < WIDTH_Z)[None, :]
    steps = tl.arange(0, BLOCK)
    for first in range(0, features, BLOCK_F):
        rows = (first + tl.arange(0, BLOCK_F)).to(tl.int64)
        there = rows < features
        w = load_projection(w_ptr, rows, there, w_strides, WIDTH, PADDED, LIKE)
        cells = state_base + rows[:, None] * state_strides[3] + columns.to(tl.int64)[None, :] * state_strides[4]
        state = tl.load(cells, mask=there[:, None] & wanted, other=0.0)
        side = tl.zeros((BLOCK_F,), tl.float32)
        if bottom_ptr is not None:
            beside = side_ptr + at_span.to(tl.int64) * side_strides[0] + batch * side_strides[1] + state_head * side_strides[2]
            side = tl.load(beside + rows * side_strides[3], mask=there, other=0.0)
        at = tl.load(before_ptr + at_span * shares + shared)
        for start in range(at_span * span, tl.minimum(at_span * span + span, len_x), BLOCK):
            times = start + steps
            lines = times
            if REVERSE:
                lines = len_x - 1 - times
            inside = (lines >= 0) & (lines < len_x)
            x_level = tl.load(x_level_ptr + shared * len_x + lines, mask=inside, other=-NEGATIVE)
            shown = (x_level == -NEGATIVE) == 0
            largest = tl.load(x_largest_ptr + x_row + lines, mask=inside, other=0.0)
            x = load_tile(x_base, lines, shown, x_strides, WIDTH, PADDED)
            x = phi(x, w, there, largest, root, epsilon, EXPONENT, LIKE)
            shrunk = tl.exp(at - x_level)
            out = tl.dot(x, narrowed(state, LIKE), input_precision=PRECISION) * shrunk[:, None]
            bottom = tl.zeros((BLOCK,), tl.float32)
            if bottom_ptr is not None:
                bottom = tl.sum(x.to(tl.float32) * side[None, :], 1) * shrunk
            if CAUSAL:
                y_level = tl.load(y_level_ptr + shared * len_y + lines, mask=inside, other=NEGATIVE)
                seen = (y_level == NEGATIVE) == 0
                largest = tl.load(y_largest_ptr + y_row + lines, mask=inside, other=0.0)
                y = load_tile(y_base, lines, seen, y_strides, WIDTH, PADDED)
                y = phi(y, w, there, largest, root, epsilon, EXPONENT, LIKE)
                z = load_tile(z_base, lines, seen, z_strides, WIDTH_Z, PADDED_Z)
                if factor_ptr is not None:
                    z *= tl.load(factor_ptr + y_row + lines, mask=inside, other=0.0)[:, None]
                exponents = tl.where(steps[:, None] >= steps[None, :], y_level[None, :] - x_level[:, None], NEGATIVE)
                scores = tl.dot(x, tl.trans(y), input_precision=PRECISION) * tl.exp(exponents)
                scores = narrowed(scores, LIKE)
                out = tl.dot(scores, narrowed(z, LIKE), out, input_precision=PRECISION)
                after = tl.maximum(at, tl.max(y_level, 0))
                grown, kept = tl.exp(y_level - safe(after)), tl.exp(at - safe(after))
                if bottom_ptr is not None:
                    bottom += tl.sum(scores.to(tl.float32), 1)
                    side = side * kept + tl.sum(y.to(tl.float32) * grown[:, None], 0)
                state = tl.dot(tl.trans(y), narrowed(z * grown[:, None], LIKE), state * kept, input_precision=PRECISION)
                at = after
            spots = (own * len_x + lines[:, None]) * WIDTH_Z + columns[None, :]
            written = inside[:, None] & wanted
            if first > 0:
                out += tl.load(partial_ptr + spots, mask=written, other=0.0)
                if bottom_ptr is not None:
                    bottom += tl.load(bottom_ptr + own * len_x + lines, mask=inside, other=0.0)
            if bottom_ptr is not None:
                tl.store(bottom_ptr + own * len_x + lines, bottom, mask=inside)
            if first + BLOCK_F < features:
                tl.store(partial_ptr + spots, out, mask=written)
            else:
                if bottom_ptr is not None:
                    bottom += eps
                    # a query that has seen nothing gives 0
                    out = out / tl.where(bottom == 0.0, 1.0, bottom)[:, None]
                tl.store(out_ptr + spots, out.to(out_ptr.dtype.element_ty), mask=written)
        tl.debug_barrier()


@triton.jit(do_not_specialize=VARYING)
def gradient_kernel(
    x_ptr,
    y_ptr,
    z_ptr,
    own_ptr,
    w_ptr,
    z_largest_ptr,
    own_largest_ptr,
    x_level_ptr,
    y_level_ptr,
    x_factor_ptr,
    y_factor_ptr,
    x_weight_ptr,
    y_weight_ptr,
    before_ptr,
    state_ptr,
    side_ptr,
    out_ptr,
    partial_ptr,
    x_strides,
    y_strides,
    z_strides,
    own_strides,
    w_strides,
    state_strides,
    side_strides,
    heads,
    groups,
    spans,
    span,
    len_x,
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
    CAUSAL: tl.constexpr,
    REVERSE: tl.constexpr,
    NORM: tl.constexpr,
    LIKE: tl.constexpr,
    PRECISION: tl.constexpr,
    EXPONENT: tl.constexpr,
):
    """The gradient of what `own` is features of, over one span. NORM: a level falls with the square of its line, too."""
    program = tl.program_id(0)
    at_span, pair = program % spans, program // spans
    batch, head = (pair // heads).to(tl.int64), pair % heads
    x_base = x_ptr + head_place(batch, head, groups[0], x_strides)
    y_base = y_ptr + head_place(batch, head, groups[1], y_strides)
    z_base = z_ptr + head_place(batch, head, groups[2], z_strides)
    own_base = own_ptr + head_place(batch, head, groups[5], own_strides)
    line_x, line_y = pair.to(tl.int64) * len_x, pair.to(tl.int64) * len_y
    z_row, own_row = (pair // groups[2]).to(tl.int64) * len_y, (pair // groups[5]).to(tl.int64) * len_x
    shared = (pair // groups[3]).to(tl.int64)
    shares = tl.num_programs(0) // spans // groups[3]
    state_head = (head // groups[4]).to(tl.int64)
    state_base = state_ptr + at_span.to(tl.int64) * state_strides[0] + batch * state_strides[1] + state_head * state_strides[2]
    side_base = side_ptr + at_span.to(tl.int64) * side_strides[0] + batch * side_strides[1] + state_head * side_strides[2]
    columns, narrow = tl.arange(0, PADDED), tl.arange(0, PADDED_Z)
    steps = tl.arange(0, BLOCK)
    for first in range(0, features, BLOCK_F):
        rows = (first + tl.arange(0, BLOCK_F)).to(tl.int64)
        there = rows < features
        w = load_projection(w_ptr, rows, there, w_strides, WIDTH, PADDED, LIKE)
        cells = state_base + rows[:, None] * state_strides[3] + narrow.to(tl.int64)[None, :] * state_strides[4]
        state = tl.load(cells, mask=there[:, None] & (narrow < WIDTH_Z)[None, :], other=0.0)
        side = tl.load(side_base + rows * side_strides[3], mask=there, other=0.0)
        at = tl.load(before_ptr + at_span * shares + shared)
        for start in range(at_span * span, tl.minimum(at_span * span + span, len_x), BLOCK):
            times = start + steps
            lines = times
            if REVERSE:
                lines = len_x - 1 - times
            inside = (lines >= 0) & (lines < len_x)
            x_level = tl.load(x_level_ptr + shared * len_x + lines, mask=inside, other=-NEGATIVE)
            shown = (x_level == -NEGATIVE) == 0
            x = load_tile(x_base, lines, shown, x_strides, WIDTH_Z, PADDED_Z)
            x_weight = tl.where(shown, 1.0, 0.0)
            if x_factor_ptr is not None:
                x *= tl.load(x_factor_ptr + line_x + lines, mask=inside, other=0.0)[:, None]
                x_weight = tl.load(x_weight_ptr + line_x + lines, mask=inside, other=0.0)
            x = narrowed(x, LIKE)
            grad = tl.dot(x, tl.trans(narrowed(state, LIKE)), input_precision=PRECISION) + x_weight[:, None] * side[None, :]
            grad *= tl.exp(at - x_level)[:, None]
            if CAUSAL:
                y_level = tl.load(y_level_ptr + shared * len_y + lines, mask=inside, other=NEGATIVE)
                seen = (y_level == NEGATIVE) == 0
                y = load_tile(y_base, lines, seen, y_strides, WIDTH_Z, PADDED_Z)
                y_weight = tl.where(seen, 1.0, 0.0)
                if y_factor_ptr is not None:
                    y *= tl.load(y_factor_ptr + line_y + lines, mask=inside, other=0.0)[:, None]
                    y_weight = tl.load(y_weight_ptr + line_y + lines, mask=inside, other=0.0)
                largest = tl.load(z_largest_ptr + z_row + lines, mask=inside, other=0.0)
                z = load_tile(z_base, lines, seen, z_strides, WIDTH, PADDED)
                z = phi(z, w, there, largest, root, epsilon, EXPONENT, LIKE)
                exponents = tl.where(steps[:, None] >= steps[None, :], y_level[None, :] - x_level[:, None], NEGATIVE)
                scores = tl.dot(x, tl.trans(narrowed(y, LIKE)), input_precision=PRECISION) + x_weight[:, None] * y_weight[None, :]
                grad = tl.dot(narrowed(scores * tl.exp(exponents), LIKE), z, grad, input_precision=PRECISION)
                after = tl.maximum(at, tl.max(y_level, 0))
                grown, kept = tl.exp(y_level - safe(after)), tl.exp(at - safe(after))
                state = tl.dot(tl.trans(z), narrowed(y * grown[:, None], LIKE), state * kept, input_precision=PRECISION)
                side = side * kept + tl.sum(z.to(tl.float32) * (grown * y_weight)[:, None], 0)
                at = after
            largest = tl.load(own_largest_ptr + own_row + lines, mask=inside, other=0.0)
            own = load_tile(own_base, lines, shown, own_strides, WIDTH, PADDED)
            slopes = grad * powers(own, w, there, largest, root, EXPONENT)
            out = tl.dot(narrowed(slopes, LIKE), narrowed(w, LIKE), input_precision=PRECISION) * root
            if NORM:
                falls = tl.sum(slopes + grad * epsilon, 1) * root * root
                out -= own * falls[:, None]
            spots = (pair.to(tl.int64) * len_x + lines[:, None]) * WIDTH + columns[None, :]
            written = inside[:, None] & (columns < WIDTH)[None, :]
            if first > 0:
                out += tl.load(partial_ptr + spots, mask=written, other=0.0)
            if first + BLOCK_F < features:
                tl.store(partial_ptr + spots, out, mask=written)
            else:
                tl.store(out_ptr + spots, tl.where(shown[:, None], out, 0.0).to(out_ptr.dtype.element_ty), mask=written)
        tl.debug_barrier()
