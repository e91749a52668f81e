"""One carried state, once: out_t = x_t (T_0 + sum_{s <= t} y_s^T z_s), of which linear attention and its three gradients are cases.

| computes | x | y | z | side sum |
|---|---|---|---|---|
| out | phi(q) | phi(k) | v | y: the denominator |
| d phi(q) | dN | v | phi(k) | z, weighed by dD |
| d phi(k), backwards in time | v | dN | phi(q) | z, weighed by dD |
| dv, backwards in time | phi(k) | phi(q) | dN | |

N and D being numerator and denominator, dN = dO / D. Features are computed on load and never written. Without CAUSAL every x sees the
whole state. A program owns BLOCK_Z columns of z and one span of time; `sum_kernel` and `prefix_kernel` make the states at the starts of
spans. Chunked form: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", 2023, section 4.
"""

import triton
import triton.language as tl

VARYING = ["heads", "head_groups", "lead", "blocks", "spans", "span", "len_x", "len_y", "count", "columns"]
NO_SIDE, OF_Y, OF_Z = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def narrowed(x, LIKE: tl.constexpr):
    """An operand of a product. float16 is held in float32, rounded to the 11 bits of tf32: features and states outgrow its exponent."""
    if LIKE == tl.bfloat16:
        return x.to(tl.bfloat16)
    elif LIKE == tl.float16:
        return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    else:
        return x


@triton.jit
def head_place(batch, head, group, strides):
    """Where a head of a tensor begins that has one for each `group`, and perhaps members of its own in it."""
    place = batch * strides[0] + (head // group).to(tl.int64) * strides[1]
    if len(strides) == 5:
        place += (head % group).to(tl.int64) * strides[4]
    return place


@triton.jit
def load_features(
    base, lines, inside, strides, first, factor, MAP: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr
):
    """(lines, BLOCK) of a map's features from column `first` on, in float32. Those past PADDED are of -x: the other half of crelu."""
    columns = first + tl.arange(0, BLOCK)
    places = columns % PADDED
    there = inside[:, None] & (places < WIDTH)[None, :]
    x = tl.load(base + lines[:, None] * strides[2] + places.to(tl.int64)[None, :] * strides[3], mask=there, other=0.0).to(tl.float32)
    x = tl.where((columns < PADDED)[None, :], x, -x)
    return tl.where(there, MAP(x) * factor, 0.0)


@triton.jit
def load_lines(base, at, inside, GIVEN: tl.constexpr):
    """A factor for each line, one where none is given."""
    if GIVEN:
        return tl.load(base + at, mask=inside, other=0.0)
    else:
        return tl.where(inside, 1.0, 0.0)


@triton.jit
def visible(padding_ptr, batch, lines, inside, strides, PADDING: tl.constexpr):
    if PADDING:
        return inside & (tl.load(padding_ptr + batch * strides[0] + lines * strides[1], mask=inside, other=1) == 0)
    else:
        return inside


@triton.jit
def state_places(first, WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """Where features lie in a state that is held without padding, and which exist."""
    columns = first + tl.arange(0, BLOCK)
    places = columns % PADDED
    return (columns // PADDED * WIDTH + places).to(tl.int64), places < WIDTH


@triton.jit(do_not_specialize=VARYING)
def sum_kernel(
    y_ptr,
    z_ptr,
    y_factor_ptr,
    z_factor_ptr,
    weight_ptr,
    padding_ptr,
    state_ptr,
    side_ptr,
    y_strides,
    z_strides,
    padding_strides,
    heads,
    head_groups,
    blocks,
    spans,
    span,
    len_y,
    y_scale,
    z_scale,
    MAP_Y: tl.constexpr,
    MAP_Z: tl.constexpr,
    WIDTH_Y: tl.constexpr,
    WIDTH_Z: tl.constexpr,
    PADDED_Y: tl.constexpr,
    PADDED_Z: tl.constexpr,
    FEATURES_Y: tl.constexpr,
    FEATURES_Z: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_Z: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
    LIKE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sum_s y_s^T z_s over each span, into (spans, B heads, features of y, features of z), and of each span sum_s weight_s y_s."""
    program = tl.program_id(0)
    at_span, block, pair = program % spans, program // spans % blocks, program // spans // blocks
    batch, head = (pair // heads).to(tl.int64), pair % heads
    y_base = y_ptr + head_place(batch, head, head_groups[0], y_strides)
    z_base = z_ptr + head_place(batch, head, head_groups[1], z_strides)
    row = pair.to(tl.int64) * len_y
    state = tl.zeros((BLOCK_Y, BLOCK_Z), tl.float32)
    side = tl.zeros((BLOCK_Y,), tl.float32)
    for start in range(at_span * span, tl.minimum(at_span * span + span, len_y), BLOCK):
        lines = (start + tl.arange(0, BLOCK)).to(tl.int64)
        if REVERSE:
            lines = len_y - 1 - lines
        inside = visible(padding_ptr, batch, lines, (lines >= 0) & (lines < len_y), padding_strides, padding_ptr is not None)
        weight = load_lines(weight_ptr, row + lines, inside, weight_ptr is not None)[:, None]
        y_factor = load_lines(y_factor_ptr, row + lines, inside, y_factor_ptr is not None)
        z_factor = load_lines(z_factor_ptr, row + lines, inside, z_factor_ptr is not None)
        y = load_features(y_base, lines, inside, y_strides, 0, y_factor[:, None] * y_scale, MAP_Y, WIDTH_Y, PADDED_Y, BLOCK_Y)
        z = load_features(z_base, lines, inside, z_strides, block * BLOCK_Z, z_factor[:, None] * z_scale, MAP_Z, WIDTH_Z, PADDED_Z, BLOCK_Z)
        y, z = narrowed(y, LIKE), narrowed(z, LIKE)
        state = tl.dot(tl.trans(y), z, state, input_precision=PRECISION)
        side += tl.sum(y.to(tl.float32) * weight, 0)
    rows, rows_there = state_places(0, WIDTH_Y, PADDED_Y, BLOCK_Y)
    columns, columns_there = state_places(block * BLOCK_Z, WIDTH_Z, PADDED_Z, BLOCK_Z)
    cell = at_span.to(tl.int64) * (tl.num_programs(0) // spans // blocks) + pair
    there = rows_there[:, None] & columns_there[None, :]
    tl.store(state_ptr + cell * FEATURES_Y * FEATURES_Z + rows[:, None] * FEATURES_Z + columns[None, :], state, mask=there)
    if block == 0:
        tl.store(side_ptr + cell * FEATURES_Y + rows, side, mask=rows_there)


@triton.jit(do_not_specialize=VARYING)
def prefix_kernel(state_ptr, initial_ptr, total_ptr, initial_strides, heads, lead, blocks, spans, count, columns, BLOCK: tl.constexpr):
    """In place, what lies before each span, the initial state included; and the sum of all. Heads that do not lead start from zero."""
    pair, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    batch, head = (pair // heads).to(tl.int64), pair % heads
    places = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = places < count
    running = tl.zeros((BLOCK,), tl.float32)
    if initial_ptr is not None:
        if head % lead == 0:
            base = initial_ptr + batch * initial_strides[0] + (head // lead).to(tl.int64) * initial_strides[1]
            cells = base + places // columns * initial_strides[2] + places % columns * initial_strides[3]
            running = tl.load(cells, mask=inside, other=0.0).to(tl.float32)
    step = (tl.num_programs(0) // blocks).to(tl.int64) * count
    spot = state_ptr + pair.to(tl.int64) * count + places
    for _ in range(spans):
        part = tl.load(spot, mask=inside, other=0.0)
        tl.store(spot, running, mask=inside)
        running += part
        spot += step
    tl.store(total_ptr + pair.to(tl.int64) * count + places, running, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def walk_kernel(
    x_ptr,
    y_ptr,
    z_ptr,
    x_factor_ptr,
    y_factor_ptr,
    z_factor_ptr,
    x_weight_ptr,
    y_weight_ptr,
    x_padding_ptr,
    y_padding_ptr,
    own_ptr,
    out_ptr,
    state_ptr,
    side_ptr,
    last_state_ptr,
    last_side_ptr,
    x_strides,
    y_strides,
    z_strides,
    padding_strides,
    own_strides,
    out_strides,
    state_strides,
    side_strides,
    heads,
    head_groups,
    lead,
    blocks,
    spans,
    span,
    len_x,
    len_y,
    x_scale,
    y_scale,
    z_scale,
    out_scale,
    eps,
    MAP_X: tl.constexpr,
    MAP_Y: tl.constexpr,
    MAP_Z: tl.constexpr,
    SLOPE: tl.constexpr,
    WIDTH_Y: tl.constexpr,
    WIDTH_Z: tl.constexpr,
    PADDED_Y: tl.constexpr,
    PADDED_Z: tl.constexpr,
    FEATURES_Y: tl.constexpr,
    FEATURES_Z: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_Z: tl.constexpr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    REVERSE: tl.constexpr,
    SIDE: tl.constexpr,
    DIVIDE: tl.constexpr,
    LIKE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The outputs of one span and BLOCK_Z columns, from the state before it; with a single span also the last state."""
    program = tl.program_id(0)
    at_span, block, pair = program % spans, program // spans % blocks, program // spans // blocks
    batch, head = (pair // heads).to(tl.int64), pair % heads
    x_base = x_ptr + head_place(batch, head, head_groups[0], x_strides)
    y_base = y_ptr + head_place(batch, head, head_groups[1], y_strides)
    z_base = z_ptr + head_place(batch, head, head_groups[2], z_strides)
    state_head = (head // head_groups[3]).to(tl.int64)
    out_base = out_ptr + head_place(batch, head, head_groups[5], out_strides)
    x_row, y_row = pair.to(tl.int64) * len_x, pair.to(tl.int64) * len_y
    rows, rows_there = state_places(0, WIDTH_Y, PADDED_Y, BLOCK_Y)
    columns, columns_there = state_places(block * BLOCK_Z, WIDTH_Z, PADDED_Z, BLOCK_Z)
    there = rows_there[:, None] & columns_there[None, :]
    state = tl.zeros((BLOCK_Y, BLOCK_Z), tl.float32)
    side = tl.zeros((BLOCK_Y if SIDE == OF_Y else BLOCK_Z,), tl.float32)
    leads = head % lead == 0
    begins = leads
    if last_state_ptr is not None:
        begins = lead > 0
    if state_ptr is not None:
        if begins:
            base = state_ptr + at_span.to(tl.int64) * state_strides[0] + batch * state_strides[1] + state_head * state_strides[2]
            state = tl.load(base + rows[:, None] * state_strides[3] + columns[None, :] * state_strides[4], mask=there, other=0.0).to(
                tl.float32
            )
    if side_ptr is not None:
        if begins:
            base = side_ptr + at_span.to(tl.int64) * side_strides[0] + batch * side_strides[1] + state_head * side_strides[2]
            if SIDE == OF_Y:
                side = tl.load(base + rows * side_strides[3], mask=rows_there, other=0.0).to(tl.float32)
            if SIDE == OF_Z:
                side = tl.load(base + columns * side_strides[3], mask=columns_there, other=0.0).to(tl.float32)
    steps = tl.arange(0, BLOCK)
    for start in range(at_span * span, tl.minimum(at_span * span + span, len_x), BLOCK):
        times = (start + steps).to(tl.int64)
        lines = times
        if REVERSE:
            lines = len_x - 1 - times
        inside = (lines >= 0) & (lines < len_x)
        shown = visible(x_padding_ptr, batch, lines, inside, padding_strides, x_padding_ptr is not None)
        x_factor = load_lines(x_factor_ptr, x_row + lines, shown, x_factor_ptr is not None)
        x_weight = load_lines(x_weight_ptr, x_row + lines, shown, x_weight_ptr is not None)
        x = load_features(x_base, lines, shown, x_strides, 0, x_factor[:, None] * x_scale, MAP_X, WIDTH_Y, PADDED_Y, BLOCK_Y)
        x = narrowed(x, LIKE)
        out = tl.dot(x, narrowed(state, LIKE), input_precision=PRECISION)
        # the denominator is of the same rounded features, so that what their rounding does to both cancels
        bottom = tl.zeros((BLOCK,), tl.float32)
        if SIDE == OF_Y:
            bottom = tl.sum(x.to(tl.float32) * side[None, :], 1)
        if SIDE == OF_Z:
            out += x_weight[:, None] * side[None, :]
        if CAUSAL:
            seen = visible(y_padding_ptr, batch, lines, inside, padding_strides, y_padding_ptr is not None)
            y_factor = load_lines(y_factor_ptr, y_row + lines, seen, y_factor_ptr is not None)
            z_factor = load_lines(z_factor_ptr, y_row + lines, seen, z_factor_ptr is not None)
            y = load_features(y_base, lines, seen, y_strides, 0, y_factor[:, None] * y_scale, MAP_Y, WIDTH_Y, PADDED_Y, BLOCK_Y)
            z = load_features(
                z_base, lines, seen, z_strides, block * BLOCK_Z, z_factor[:, None] * z_scale, MAP_Z, WIDTH_Z, PADDED_Z, BLOCK_Z
            )
            y, z = narrowed(y, LIKE), narrowed(z, LIKE)
            scores = tl.dot(x, tl.trans(y), input_precision=PRECISION)
            if SIDE == OF_Z:
                y_weight = load_lines(y_weight_ptr, y_row + lines, seen, y_weight_ptr is not None)
                scores += x_weight[:, None] * y_weight[None, :]
                side += tl.sum(z.to(tl.float32) * y_weight[:, None], 0)
            scores = narrowed(tl.where(steps[:, None] >= steps[None, :], scores, 0.0), LIKE)
            if SIDE == OF_Y:
                bottom += tl.sum(scores.to(tl.float32), 1)
                side += tl.sum(y.to(tl.float32), 0)
            out = tl.dot(scores, z, out, input_precision=PRECISION)
            state = tl.dot(tl.trans(y), z, state, input_precision=PRECISION)
        if DIVIDE:
            out = out / (bottom + eps)[:, None]
        places, written = columns, inside[:, None] & columns_there[None, :]
        if SLOPE is not None:
            # what phi hands back to its argument; the halves of crelu write disjoint elements
            features = block * BLOCK_Z + tl.arange(0, BLOCK_Z)
            places = (features % PADDED_Z).to(tl.int64)
            at = own_ptr + head_place(batch, head, head_groups[4], own_strides)
            kept = shown[:, None] & columns_there[None, :]
            own = tl.load(at + lines[:, None] * own_strides[2] + places[None, :] * own_strides[3], mask=kept, other=0.0).to(tl.float32)
            upper = (features < PADDED_Z)[None, :]
            if FEATURES_Z != WIDTH_Z:
                written &= tl.where(upper, (own < 0.0) == 0, own < 0.0)
            own = tl.where(upper, own, -own)
            out *= tl.where(upper, out_scale, -out_scale) * SLOPE(own)
        out = tl.where(shown[:, None], out, 0.0)
        tl.store(
            out_base + lines[:, None] * out_strides[2] + places[None, :] * out_strides[3], out.to(out_ptr.dtype.element_ty), mask=written
        )
    if last_state_ptr is not None:
        if leads:
            cell = batch * (heads // lead) + state_head
            tl.store(last_state_ptr + cell * FEATURES_Y * FEATURES_Z + rows[:, None] * FEATURES_Z + columns[None, :], state, mask=there)
            if block == 0:
                tl.store(last_side_ptr + cell * FEATURES_Y + rows, side, mask=rows_there)
