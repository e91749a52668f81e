"""Of FAVOR+, which Performer attention runs."""

from __future__ import annotations

from triton_attn.testing.equivalents.argument import Argument

PERFORMER = ("performer_attention",)
W = "tl.load(w_ptr + rows[:, None] * strides[0] + columns.to(tl.int64)[None, :] * strides[1], mask=mask, other="

FAVOR = (
    Argument(
        "y and z of every sum and of every walk to outputs have as many heads as each other",
        (
            "sum_kernel: groups[0] -> groups[1]",
            "sum_kernel: groups[1] -> groups[0]",
            "out_kernel: groups[2] -> groups[1]",
        ),
        PERFORMER,
    ),
    Argument(
        "only a call with more than 2^31 lines or numbers in a state shows it: gigabytes that no test allocates",
        (
            "level_kernel: pair.to(tl.int64) -> pair",
            "sum_kernel: shared.to(tl.int64) -> shared",
            "prefix_kernel: pairs.to(tl.int64) -> pairs",
            *(f"out_kernel: (pair // groups[{i}]).to(tl.int64) -> pair // groups[{i}]" for i in (0, 1)),
        ),
        PERFORMER,
    ),
    Argument(
        "where W has no column, what it meets is 0; where it has no row, no power is taken",
        (f"load_projection: {W}0.0) -> {W}1)",),
        PERFORMER,
    ),
)
