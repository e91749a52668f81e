"""The selective scan, backward: chunks of BLOCK_T steps in reverse, each recomputed from the state that it starts from.

The states inside a chunk stay in registers. With a_t = exp(Delta_t A) and dh_t the gradient of the state after step t:
dh_t = C_t dy_t + a_{t+1} dh_{t+1}, and x_t = dh_t a_t h_{t-1} gives dDelta and dA. a_t h_{t-1} is computed, not h_t - Delta_t u_t B_t,
which cancels. dB and dC are summed over a program's channels and go to its own slice of a partial tensor; nothing is added atomically.
"""

import triton
import triton.language as tl

from triton_attn.kernels._scan import (
    LOG2E,
    VARYING,
    below,
    is_live,
    load_channels,
    load_per_channel,
    load_state_vector,
    owned,
    sigmoid,
    state_pointers,
    step_size,
)


@triton.jit
def store_channels(pointer, batch, t, strides, channel, value, inside):
    """One step of a (B, D, L) gradient."""
    pointers = pointer + batch * strides[0] + channel * strides[1] + t * strides[2]
    tl.store(pointers, value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def store_partial(pointer, batch, group, block, t, strides, n, value, inside):
    """One step of a (B, G, blocks, L, N) partial sum."""
    pointers = pointer + batch * strides[0] + group * strides[1] + block.to(tl.int64) * strides[2] + t * strides[3] + n
    tl.store(pointers, value, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def backward_kernel(
    grad_out_ptr,
    grad_last_ptr,
    u_ptr,
    delta_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    d_ptr,
    z_ptr,
    bias_ptr,
    states_ptr,
    mask_ptr,
    cu_ptr,
    du_ptr,
    ddelta_ptr,
    da_ptr,
    db_ptr,
    dc_ptr,
    dd_ptr,
    dz_ptr,
    dbias_ptr,
    dinitial_ptr,
    grad_out_strides,
    grad_last_strides,
    u_strides,
    delta_strides,
    a_strides,
    b_strides,
    c_strides,
    d_strides,
    z_strides,
    bias_strides,
    states_strides,
    mask_strides,
    cu_strides,
    du_strides,
    ddelta_strides,
    da_strides,
    partial_strides,
    sums_strides,
    dz_strides,
    groups,
    per_group,
    blocks,
    length,
    chunks,
    SOFTPLUS: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Every gradient; those of A, D and the bias once per sequence, those of B and C once per block of channels."""
    batch, sequence, group, block, lane, channel, first, count, chunk = owned(
        groups, per_group, blocks, length, chunks, cu_ptr, cu_strides, BLOCK_D, BLOCK_T
    )
    n = tl.arange(0, BLOCK_N)
    in_d = lane < per_group
    in_n = n < N
    in_state = in_d[:, None] & in_n[None, :]
    a = tl.load(state_pointers(a_ptr, 0, (0, a_strides[0], a_strides[1]), channel, n), mask=in_state, other=0.0).to(tl.float32)
    rate = a * LOG2E
    skip = load_per_channel(d_ptr, d_strides, channel, in_d, BLOCK_D)
    bias = load_per_channel(bias_ptr, bias_strides, channel, in_d, BLOCK_D)
    dh = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    if grad_last_ptr is not None:
        dh = tl.load(state_pointers(grad_last_ptr, sequence, grad_last_strides, channel, n), mask=in_state, other=0.0).to(tl.float32)
    da = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    dd = tl.zeros((BLOCK_D,), tl.float32)
    dbias = tl.zeros((BLOCK_D,), tl.float32)
    u_base = u_ptr + batch * u_strides[0]
    delta_base = delta_ptr + batch * delta_strides[0]
    b_base = b_ptr + batch * b_strides[0] + group * b_strides[1]
    c_base = c_ptr + batch * c_strides[0] + group * c_strides[1]
    last = tl.cdiv(count, BLOCK_T) - 1
    for back in range(0, last + 1):
        start = (last - back) * BLOCK_T
        h = tl.load(state_pointers(states_ptr, chunk + last - back, states_strides, channel, n), mask=in_state, other=0.0)
        before = (h,)
        for i in tl.static_range(BLOCK_T):
            t = first + start + i
            live = is_live(mask_ptr, mask_strides, batch, start + i, first, count)
            u = load_channels(u_base, t, u_strides, channel, below(lane, per_group, live))
            raw = load_channels(delta_base, t, delta_strides, channel, below(lane, per_group, live)) + bias
            b = load_state_vector(b_base, t, b_strides, n, below(n, N, live))
            size = step_size(raw, live, SOFTPLUS)
            h = tl.exp2(size[:, None] * rate) * h + (size * u)[:, None] * b[None, :]
            before = before + (h,)  # type: ignore[assignment]
        for i in tl.static_range(BLOCK_T - 1, -1, -1):
            t = first + start + i
            exists = start + i < count
            live = is_live(mask_ptr, mask_strides, batch, start + i, first, count)
            inside, written = below(lane, per_group, live), below(lane, per_group, exists)
            u = load_channels(u_base, t, u_strides, channel, inside)
            raw = load_channels(delta_base, t, delta_strides, channel, inside) + bias
            b = load_state_vector(b_base, t, b_strides, n, below(n, N, live))
            c = load_state_vector(c_base, t, c_strides, n, below(n, N, live))
            size = step_size(raw, live, SOFTPLUS)
            dy = load_channels(grad_out_ptr + batch * grad_out_strides[0], t, grad_out_strides, channel, inside)
            if z_ptr is not None:
                z = load_channels(z_ptr + batch * z_strides[0], t, z_strides, channel, inside)
                y = tl.sum(before[i + 1] * c[None, :], 1) + skip * u
                gate = sigmoid(z)
                store_channels(dz_ptr, batch, t, dz_strides, channel, dy * y * gate * (1.0 + z * (1.0 - gate)), written)
                dy = dy * z * gate
            dh += dy[:, None] * c[None, :]
            decay = tl.exp2(size[:, None] * rate)
            x = dh * decay * before[i]
            through = tl.sum(dh * b[None, :], 1)
            dsize = u * through + tl.sum(a * x, 1)
            draw = tl.where(live, dsize, 0.0)
            if SOFTPLUS:
                draw = draw * sigmoid(raw)
            store_channels(du_ptr, batch, t, du_strides, channel, skip * dy + size * through, written)
            store_channels(ddelta_ptr, batch, t, ddelta_strides, channel, draw, written)
            if db_ptr is not None:
                db = tl.where(live, tl.sum(dh * (size * u)[:, None], 0), 0.0)
                store_partial(db_ptr, batch, group, block, t, partial_strides, n, db, below(n, N, exists))
            if dc_ptr is not None:
                dc = tl.where(live, tl.sum(dy[:, None] * before[i + 1], 0), 0.0)
                store_partial(dc_ptr, batch, group, block, t, partial_strides, n, dc, below(n, N, exists))
            da += size[:, None] * x
            dd += dy * u
            dbias += draw
            dh = decay * dh
    tl.store(state_pointers(da_ptr, sequence, da_strides, channel, n), da, mask=in_state)
    if dinitial_ptr is not None:
        tl.store(state_pointers(dinitial_ptr, sequence, da_strides, channel, n), dh, mask=in_state)
    sums = sequence * sums_strides[0] + channel * sums_strides[1]
    if dd_ptr is not None:
        tl.store(dd_ptr + sums, dd, mask=in_d)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + sums, dbias, mask=in_d)
