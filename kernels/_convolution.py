"""The short causal convolution in Triton: a program owns a few channels and steps of one item, and reads every tap's tile.

Taps overlap, so all but the first come from the cache. The backward pass recomputes the sums before the activation at each of the
steps that a tile's gradient comes from; gradients of weight and bias are sums over a program's steps, added up afterwards.
"""

import triton
import triton.language as tl

from triton_attn.kernels._scan import sigmoid

# lengths and counts change from call to call: a binary for each of their divisors would be compiled again and again
VARYING = ["channels", "length", "blocks_d", "blocks_t"]


@triton.jit
def owned(channels, blocks_d, blocks_t, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr):
    """(batch, channels, whether they exist, steps, number among the programs of these channels)."""
    program = tl.program_id(0)
    block = program % blocks_t
    lane = program // blocks_t % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    batch = (program // blocks_t // blocks_d).to(tl.int64)
    t = (block * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    return batch, lane.to(tl.int64)[:, None], (lane < channels)[:, None], t, batch * blocks_t + block


@triton.jit
def of_channels(pointer, strides, i, channel, in_d):
    """The i-th column of a (D, K) matrix."""
    column = tl.full((), i, tl.int64)  # 32 bits are not enough for its product
    return tl.load(pointer + channel * strides[0] + column * strides[1], mask=in_d)


@triton.jit
def at_steps(pointer, strides, batch, channel, t, inside):
    """Steps t of an item of a (B, D, L) tensor, in fp32; 0 where not inside."""
    place = pointer + batch * strides[0] + channel * strides[1] + t[None, :] * strides[2]
    return tl.load(place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def are_one_sequence(seq_ptr, strides, batch, t, s, length):
    """Whether steps t and s, which are not before t, have the same number; anything where one of them does not exist."""
    inside = (t >= 0) & (s < length)
    base = seq_ptr + batch * strides[0]
    return tl.load(base + t * strides[1], mask=inside) == tl.load(base + s * strides[1], mask=inside)


@triton.jit
def tap(
    x_ptr,
    initial_ptr,
    seq_ptr,
    x_strides,
    initial_strides,
    seq_strides,
    batch,
    channel,
    in_d,
    s,
    length,
    BACK: tl.constexpr,
    PAST: tl.constexpr,
):
    """What steps s see BACK steps before them: x, an initial state, or 0."""
    t = s - BACK
    seen = at_steps(x_ptr, x_strides, batch, channel, t, in_d & ((t >= 0) & (t < length))[None, :])
    if initial_ptr is not None:
        seen += at_steps(initial_ptr, initial_strides, batch, channel, t + PAST, in_d & ((t < 0) & (t >= -PAST))[None, :])
    if seq_ptr is not None:
        seen = tl.where(are_one_sequence(seq_ptr, seq_strides, batch, t, s, length)[None, :], seen, 0.0)
    return seen


@triton.jit
def convolved(
    x_ptr,
    w_ptr,
    bias_ptr,
    initial_ptr,
    seq_ptr,
    x_strides,
    w_strides,
    bias_strides,
    initial_strides,
    seq_strides,
    batch,
    channel,
    in_d,
    s,
    length,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The sums at steps s, before the activation."""
    y = tl.zeros((BLOCK_D, BLOCK_T), tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + channel * bias_strides[0], mask=in_d)
    for i in tl.static_range(WIDTH):
        seen = tap(
            x_ptr, initial_ptr, seq_ptr, x_strides, initial_strides, seq_strides, batch, channel, in_d, s, length, WIDTH - 1 - i, WIDTH - 1
        )
        y += of_channels(w_ptr, w_strides, i, channel, in_d) * seen
    return y


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    initial_ptr,
    seq_ptr,
    out_ptr,
    x_strides,
    w_strides,
    bias_strides,
    initial_strides,
    seq_strides,
    out_strides,
    channels,
    length,
    blocks_d,
    blocks_t,
    SILU: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    batch, channel, in_d, t, number = owned(channels, blocks_d, blocks_t, BLOCK_D, BLOCK_T)
    y = convolved(
        x_ptr,
        w_ptr,
        bias_ptr,
        initial_ptr,
        seq_ptr,
        x_strides,
        w_strides,
        bias_strides,
        initial_strides,
        seq_strides,
        batch,
        channel,
        in_d,
        t,
        length,
        WIDTH,
        BLOCK_D,
        BLOCK_T,
    )
    if SILU:
        y = y * sigmoid(y)
    place = out_ptr + batch * out_strides[0] + channel * out_strides[1] + t[None, :] * out_strides[2]
    tl.store(place, y, mask=in_d & (t < length)[None, :])


@triton.jit(do_not_specialize=VARYING)
def backward_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    initial_ptr,
    seq_ptr,
    grad_ptr,
    grad_final_ptr,
    dx_ptr,
    dinitial_ptr,
    partial_ptr,
    x_strides,
    w_strides,
    bias_strides,
    initial_strides,
    seq_strides,
    grad_strides,
    grad_final_strides,
    dx_strides,
    dinitial_strides,
    partial_strides,
    channels,
    length,
    blocks_d,
    blocks_t,
    SILU: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Gradients of x and of the initial states, which are steps before 0; partial sums of weight's, and bias's in a last column."""
    PAST: tl.constexpr = WIDTH - 1
    batch, channel, in_d, t, number = owned(channels, blocks_d, blocks_t, BLOCK_D, BLOCK_T)
    if initial_ptr is not None:
        t -= PAST
    dx = tl.zeros((BLOCK_D, BLOCK_T), tl.float32)
    for ahead in tl.static_range(WIDTH):
        s = t + ahead
        inside = in_d & ((s >= 0) & (s < length))[None, :]
        dy = at_steps(grad_ptr, grad_strides, batch, channel, s, inside)
        if SILU:
            y = convolved(
                x_ptr,
                w_ptr,
                bias_ptr,
                initial_ptr,
                seq_ptr,
                x_strides,
                w_strides,
                bias_strides,
                initial_strides,
                seq_strides,
                batch,
                channel,
                in_d,
                s,
                length,
                WIDTH,
                BLOCK_D,
                BLOCK_T,
            )
            p = sigmoid(y)
            # chosen, not multiplied: beyond the end y may be infinite
            dy = tl.where(inside, dy * p * (1.0 + y * (1.0 - p)), 0.0)
        if ahead == 0 and partial_ptr is not None:
            place = partial_ptr + number * partial_strides[0] + channel * partial_strides[1]
            for i in tl.static_range(WIDTH):
                seen = tap(
                    x_ptr, initial_ptr, seq_ptr, x_strides, initial_strides, seq_strides, batch, channel, in_d, s, length, PAST - i, PAST
                )
                tl.store(place + i, tl.sum(dy * seen, 1)[:, None], mask=in_d)
            tl.store(place + WIDTH, tl.sum(dy, 1)[:, None], mask=in_d)
        weighted = of_channels(w_ptr, w_strides, PAST - ahead, channel, in_d) * dy
        if seq_ptr is not None:
            weighted = tl.where(are_one_sequence(seq_ptr, seq_strides, batch, t, s, length)[None, :], weighted, 0.0)
        dx += weighted
    if grad_final_ptr is not None:
        m = t - length + PAST
        dx += at_steps(grad_final_ptr, grad_final_strides, batch, channel, m, in_d & ((m >= 0) & (m < PAST))[None, :])
    place = dx_ptr + batch * dx_strides[0] + channel * dx_strides[1] + t[None, :] * dx_strides[2]
    tl.store(place, dx, mask=in_d & ((t >= 0) & (t < length))[None, :])
    if initial_ptr is not None:
        m = t + PAST
        place = dinitial_ptr + batch * dinitial_strides[0] + channel * dinitial_strides[1] + m[None, :] * dinitial_strides[2]
        tl.store(place, dx, mask=in_d & (m < PAST)[None, :])
