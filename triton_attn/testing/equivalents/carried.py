"""Of the carried state, which linear attention and hydra run."""

from __future__ import annotations

from triton_attn.testing.equivalents.argument import Argument

STATE = "tl.load(base + rows[:, None] * state_strides[3] + columns[None, :] * state_strides[4], mask=there, other="
SIDES = tuple(f"tl.load(base + {of} * side_strides[3], mask={of}_there, other=" for of in ("rows", "columns"))
OWN = "tl.load(at + lines[:, None] * own_strides[2] + places[None, :] * own_strides[3], mask=kept, other="
FEATURES = "tl.load(base + lines[:, None] * strides[2] + places.to(tl.int64)[None, :] * strides[3], mask=there, other="

CARRIED = (
    Argument(
        "y and z of every walk and of every sum have as many heads as each other",
        ("walk_kernel: head_groups[2] -> head_groups[1]", "sum_kernel: head_groups[1] -> head_groups[0]"),
    ),
    Argument(
        "only a call with more than 2^31 lines or numbers in a state shows it: gigabytes that no test allocates",
        ("walk_kernel: pair.to(tl.int64) -> pair", "sum_kernel: pair.to(tl.int64) -> pair", "walk_kernel: at_span.to(tl.int64) -> at_span"),
    ),
    Argument("one head in so many leads, and that is one or more", ("walk_kernel: lead > 0 -> lead >= 0",)),
    Argument(
        "states and sums are float32",
        tuple(f"walk_kernel: {load}0.0).to(tl.float32) -> {load}0.0)" for load in (STATE, *SIDES)),
    ),
    Argument(
        "features that do not exist are 0 in what meets them, columns that do not exist are not stored",
        tuple(f"walk_kernel: {load}0.0) -> {load}1)" for load in (STATE, *SIDES)),
    ),
    Argument(
        "what a line that is hidden would get is replaced by 0, a column that does not exist is not stored, and 0 and 1 are of one sign",
        (f"walk_kernel: {OWN}0.0) -> {OWN}1)",),
    ),
    Argument("what is not there is replaced by 0 at the end", (f"load_features: {FEATURES}0.0) -> {FEATURES}1)",)),
    Argument(
        "lines after the last are hidden: a cost in time alone",
        ("walk_kernel: tl.minimum(at_span * span + span, len_x) -> at_span * span + span",),
    ),
    Argument(
        "the other factor is float32, and tl.sum adds bfloat16 in float32",
        tuple(f"walk_kernel: {x}.to(tl.float32) -> {x}" for x in ("x", "y", "z", "scores")),
    ),
)
