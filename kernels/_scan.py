"""The selective scan, forward: sequential in time, channels on lanes, a (channels, N) state in registers, fp32.

One program owns BLOCK_D channels of one group of one sequence. Time is walked in groups of BLOCK_T steps, unrolled, whose loads do
not depend on the state and so can be issued ahead of it. A step that is masked or past the end has a step size of 0 *after* bias
and softplus: it decays nothing and adds nothing.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# lengths and counts change from call to call: a binary for each of their divisors would be compiled again and again
VARYING = ["groups", "per_group", "blocks", "length", "chunks"]


@triton.jit
def owned(groups, per_group, blocks, length, chunks, cu_ptr, cu_strides, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr):
    """What a program owns: (batch, sequence, group, block, lanes, channels, first step, number of steps, first chunk)."""
    program = tl.program_id(0)
    block = program % blocks
    group = program // blocks % groups
    sequence = (program // blocks // groups).to(tl.int64)
    lane = block * BLOCK_D + tl.arange(0, BLOCK_D)
    channel = (group * per_group + lane).to(tl.int64)
    if cu_ptr is None:
        batch = sequence
        first = sequence * 0
        count = first + length
        chunk = sequence * chunks
    else:
        batch = sequence * 0
        # offsets are read on the device: whatever they say, nothing beyond the tensors is touched
        first = tl.minimum(tl.maximum(tl.load(cu_ptr + sequence * cu_strides[0]).to(tl.int64), 0), length)
        end = tl.minimum(tl.maximum(tl.load(cu_ptr + (sequence + 1) * cu_strides[0]).to(tl.int64), 0), length)
        count = tl.maximum(end - first, 0)
        # sequences share no chunk: the next one's first is at least this one's last and one more
        chunk = first // BLOCK_T + sequence
    return batch, sequence, group.to(tl.int64), block, lane, channel, first, count, chunk


@triton.jit
def is_live(mask_ptr, mask_strides, batch, t, first, count):
    """Whether step t of a sequence exists and is not masked."""
    live = t < count
    if mask_ptr is not None:
        # clamped, not masked: Triton's interpreter drops the `other=0` of a scalar load
        place = first + tl.minimum(t, count - 1)
        live = live & (tl.load(mask_ptr + batch * mask_strides[0] + place * mask_strides[1]) != 0)
    return live


@triton.jit
def below(lane, end, live):
    """The lanes before an end, none where a step is not live: a scalar chosen, as triton widens lanes & scalar to integers."""
    return lane < tl.where(live, end, 0)


@triton.jit
def load_channels(base, t, strides, channel, inside):
    """One step of a (D, L) matrix, in fp32; 0 where not inside."""
    return tl.load(base + channel * strides[1] + t * strides[2], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_state_vector(base, t, strides, n, inside):
    """One step of an (N, L) matrix, in fp32; 0 where not inside."""
    return tl.load(base + n.to(tl.int64) * strides[2] + t * strides[3], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_per_channel(pointer, strides, channel, in_d, BLOCK_D: tl.constexpr):
    """A vector over channels; zeros if absent."""
    if pointer is None:
        return tl.zeros((BLOCK_D,), tl.float32)
    else:
        return tl.load(pointer + channel * strides[0], mask=in_d, other=0.0).to(tl.float32)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x), with no overflow in either direction."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def softplus(x):
    """log(1 + e^x), relatively exact for very negative x: log1p by Kahan's correction, as 1 + e rounds e away."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    w = 1.0 + e
    small = tl.where(w == 1.0, e, tl.log(w) * (e / tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.maximum(x, 0.0) + small


@triton.jit
def step_size(raw, live, SOFTPLUS: tl.constexpr):
    """Delta of a step whose biased raw value this is."""
    size = raw
    if SOFTPLUS:
        size = softplus(raw)
    return tl.where(live, size, 0.0)


@triton.jit
def state_pointers(base, index, strides, channel, n):
    """Where an (channels, N) state lies in a (S, D, N) tensor."""
    return base + index * strides[0] + channel[:, None] * strides[1] + n.to(tl.int64)[None, :] * strides[2]


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    u_ptr,
    delta_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    d_ptr,
    z_ptr,
    bias_ptr,
    initial_ptr,
    mask_ptr,
    cu_ptr,
    out_ptr,
    last_ptr,
    states_ptr,
    u_strides,
    delta_strides,
    a_strides,
    b_strides,
    c_strides,
    d_strides,
    z_strides,
    bias_strides,
    initial_strides,
    mask_strides,
    cu_strides,
    out_strides,
    last_strides,
    states_strides,
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
    """Outputs and last states; or, where `states_ptr` is given, only the state that each group of steps starts from."""
    batch, sequence, group, block, lane, channel, first, count, chunk = owned(
        groups, per_group, blocks, length, chunks, cu_ptr, cu_strides, BLOCK_D, BLOCK_T
    )
    n = tl.arange(0, BLOCK_N)
    in_d = lane < per_group
    in_n = n < N
    in_state = in_d[:, None] & in_n[None, :]
    rate = tl.load(state_pointers(a_ptr, 0, (0, a_strides[0], a_strides[1]), channel, n), mask=in_state, other=0.0).to(tl.float32) * LOG2E
    skip = load_per_channel(d_ptr, d_strides, channel, in_d, BLOCK_D)
    bias = load_per_channel(bias_ptr, bias_strides, channel, in_d, BLOCK_D)
    if initial_ptr is None:
        h = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    else:
        h = tl.load(state_pointers(initial_ptr, sequence, initial_strides, channel, n), mask=in_state, other=0.0).to(tl.float32)
    u_base = u_ptr + batch * u_strides[0]
    delta_base = delta_ptr + batch * delta_strides[0]
    b_base = b_ptr + batch * b_strides[0] + group * b_strides[1]
    c_base = c_ptr + batch * c_strides[0] + group * c_strides[1]
    for start in range(0, count, BLOCK_T):
        if states_ptr is not None:
            tl.store(state_pointers(states_ptr, chunk + start // BLOCK_T, states_strides, channel, n), h, mask=in_state)
        for i in tl.static_range(BLOCK_T):
            t = first + start + i
            live = is_live(mask_ptr, mask_strides, batch, start + i, first, count)
            u = load_channels(u_base, t, u_strides, channel, below(lane, per_group, live))
            raw = load_channels(delta_base, t, delta_strides, channel, below(lane, per_group, live)) + bias
            b = load_state_vector(b_base, t, b_strides, n, below(n, N, live))
            size = step_size(raw, live, SOFTPLUS)
            h = tl.exp2(size[:, None] * rate) * h + (size * u)[:, None] * b[None, :]
            if states_ptr is None:
                c = load_state_vector(c_base, t, c_strides, n, below(n, N, live))
                y = tl.sum(h * c[None, :], 1) + skip * u
                if z_ptr is not None:
                    z = load_channels(z_ptr + batch * z_strides[0], t, z_strides, channel, below(lane, per_group, live))
                    y = y * z * sigmoid(z)
                pointers = out_ptr + batch * out_strides[0] + channel * out_strides[1] + t * out_strides[2]
                tl.store(pointers, y.to(out_ptr.dtype.element_ty), mask=below(lane, per_group, start + i < count))
    if states_ptr is None:
        tl.store(state_pointers(last_ptr, sequence, last_strides, channel, n), h, mask=in_state)
