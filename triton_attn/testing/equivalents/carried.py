"""Of the carried state, which linear attention and hydra run."""

from __future__ import annotations

from triton_attn.testing.equivalents.argument import Argument

CARRIED = (
    Argument(
        "y and z of every walk and of every sum have as many heads as each other",
        ("walk_kernel: head_groups[2] -> head_groups[1]", "sum_kernel: head_groups[1] -> head_groups[0]"),
    ),
    Argument(
        "only a call with more than 2^31 lines or numbers in a state shows it: gigabytes that no test allocates",
        ("walk_kernel: pair.to(tl.int64) -> pair", "sum_kernel: pair.to(tl.int64) -> pair"),
    ),
)
