"""Of norms, pooling, the convolution and the scan."""

from __future__ import annotations

from triton_attn.testing.equivalents.argument import Argument

ROWS = "tl.load(x + start[:, None] + column[None, :] * strides[2], mask=seen, other=0.0)"
GAIN = "tl.load(grad_gain + row // length * t_strides[0] + row % length * t_strides[1], mask=live, other="
STATE = "tl.load(state_pointers({}, channel, n), mask=in_state, other="
RATES = STATE.format("a_ptr, 0, (0, a_strides[0], a_strides[1])")
INITIAL = STATE.format("initial_ptr, sequence, initial_strides")
GRAD_LAST = STATE.format("grad_last_ptr, sequence, grad_last_strides")
KEPT = STATE.format("states_ptr, chunk + last - back, states_strides")
CHANNEL = "tl.load(pointer + channel * strides[0], mask=in_d, other="
STATE_VECTOR = "tl.load(base + n.to(tl.int64) * strides[2] + t * strides[3], mask=inside, other=0.0)"
FIRST = "tl.load(cu_ptr + sequence * cu_strides[0]).to(tl.int64)"
END = "tl.load(cu_ptr + (sequence + 1) * cu_strides[0])"
TOKENS = "tl.load(base + token[:, None] * x_strides[2], mask=seen, other="
CELLS = "tl.load(base + cell[:, None] * g_strides[2] + column[None, :] * g_strides[3], mask=seen, other="
HIDDEN = "tl.load(padding + batch * padding_strides[0] + token * padding_strides[1], mask=there, other="

ROWS_AND_SCANS = (
    Argument(
        "sums are allocated by the launch, contiguous: their columns have step 1",
        ("backward_kernel: channel * sums_strides[1] -> channel",),
    ),
    Argument(
        "a store casts to what the pointer points to",
        (
            "store_channels: value.to(pointer.dtype.element_ty) -> value",
            "forward_kernel: y.to(out_ptr.dtype.element_ty) -> y",
        ),
    ),
    Argument(
        "columns beyond the width are 0 before they are scaled, and are not stored",
        tuple(
            f"{kernel}: tl.load({name} + column * {name[0]}_stride, mask=column < D, other=0.0)"
            f" -> tl.load({name} + column * {name[0]}_stride, mask=column < D, other=1)"
            for kernel, name in (("forward_kernel", "weight"), ("forward_kernel", "bias"), ("backward_kernel", "weight"))
        ),
    ),
    Argument(
        "what a row that does not exist would get is not stored",
        (f"backward_kernel: {GAIN}0.0) -> {GAIN}1)",),
    ),
    Argument(
        "alpha and the division by the width are float32, and so is what they meet: only a row's sum is narrow; norm_matched_add shows it",
        (f"rows_of: {ROWS}.to(tl.float32) -> {ROWS}",),
        ("add_layer_norm",),
    ),
    Argument(
        "what is not loaded has weight 0 already, or stands in a column that is not stored",
        (
            f"forward_kernel: {TOKENS}0.0) -> {TOKENS}1)",
            f"backward_kernel: {CELLS}0.0) -> {CELLS}1)",
            f"weights: {HIDDEN}1) -> {HIDDEN}0)",
        ),
    ),
    Argument(
        "a state that does not exist begins with 0 and is multiplied by B and C of 0; a channel that does not exist has u and dy of 0",
        (
            f"forward_kernel: {RATES}0.0) -> {RATES}1)",
            f"forward_kernel: {INITIAL}0.0) -> {INITIAL}1)",
            f"backward_kernel: {RATES}0.0) -> {RATES}1)",
            f"backward_kernel: {GRAD_LAST}0.0) -> {GRAD_LAST}1)",
            f"backward_kernel: {KEPT}0.0) -> {KEPT}1)",
            f"load_per_channel: {CHANNEL}0.0) -> {CHANNEL}1)",
        ),
    ),
    Argument(
        "what is read meets float32 in the first operation; a rate given in 16 bits is rounded once more in them, as it has been",
        (
            *(f"{kernel}: {RATES}0.0).to(tl.float32) -> {RATES}0.0)" for kernel in ("forward_kernel", "backward_kernel")),
            f"forward_kernel: {INITIAL}0.0).to(tl.float32) -> {INITIAL}0.0)",
            f"backward_kernel: {GRAD_LAST}0.0).to(tl.float32) -> {GRAD_LAST}0.0)",
            f"load_per_channel: {CHANNEL}0.0).to(tl.float32) -> {CHANNEL}0.0)",
            f"load_state_vector: {STATE_VECTOR}.to(tl.float32) -> {STATE_VECTOR}",
        ),
        ("selective_scan",),
    ),
    Argument(
        "a sequence that ends before it begins is as empty as one of no steps",
        (
            "owned: tl.maximum(end - first, 0) -> end - first",
            f"owned: tl.minimum(tl.maximum({FIRST}, 0), length) -> tl.maximum({FIRST}, 0)",
            f"owned: tl.maximum({END}.to(tl.int64), 0) -> {END}.to(tl.int64)",
        ),
    ),
    Argument(
        "offsets of a valid call lie within the sequence; test_selective_scan has others",
        (
            f"owned: tl.maximum({FIRST}, 0) -> {FIRST}",
            f"owned: tl.minimum(tl.maximum({END}.to(tl.int64), 0), length) -> tl.maximum({END}.to(tl.int64), 0)",
        ),
    ),
    Argument(
        "offsets and lengths fit into 32 bits; partial sums of 2^31 numbers are gigabytes that no test allocates",
        (f"owned: {END}.to(tl.int64) -> {END}", "store_partial: block.to(tl.int64) -> block"),
    ),
    Argument(
        "a step that is not live has a size of 0 and no gradient: it differs only where a state is infinite",
        (
            "backward_kernel: tl.where(live, tl.sum(dh * (size * u)[:, None], 0), 0.0) -> tl.sum(dh * (size * u)[:, None], 0)",
            "backward_kernel: tl.where(live, tl.sum(dy[:, None] * before[i + 1], 0), 0.0) -> tl.sum(dy[:, None] * before[i + 1], 0)",
        ),
    ),
    Argument("both sides are one half at 0", ("sigmoid: x >= 0 -> x > 0",)),
    Argument(
        "dy is 0 beyond the end, so it differs only where a sum there overflows; test_causal_conv1d has that call",
        ("backward_kernel: tl.where(inside, dy * p * (1.0 + y * (1.0 - p)), 0.0) -> dy * p * (1.0 + y * (1.0 - p))",),
    ),
)
