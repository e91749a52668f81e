"""Of FAVOR+, which Performer attention runs."""

from __future__ import annotations

from triton_attn.testing.equivalents.argument import Argument

PERFORMER = ("performer_attention",)
WALKS = ("out_kernel", "gradient_kernel")
W = "tl.load(w_ptr + rows[:, None] * strides[0] + columns.to(tl.int64)[None, :] * strides[1], mask=mask, other="
CELLS, BESIDE = "tl.load(cells, mask=there[:, None] & wanted, other=", "tl.load(beside + rows * side_strides[3], mask=there, other="
SHOWN = "tl.where(shown[:, None], out, 0.0)"


def _filler(kernel: str, of: str, at: str) -> str:
    """Another filler of what is loaded for each line."""
    load = f"tl.load({of}_ptr + {at} + lines, mask=inside, other="
    return f"{kernel}: {load}0.0) -> {load}1)"


FAVOR = (
    Argument(
        "y and z of every walk have as many heads as each other",
        tuple(f"{kernel}: groups[2] -> groups[1]" for kernel in WALKS),
        PERFORMER,
    ),
    Argument(
        "only a call with more than 2^31 lines or numbers in a state shows it: gigabytes that no test allocates",
        (
            "level_kernel: pair.to(tl.int64) -> pair",
            "sum_kernel: shared.to(tl.int64) -> shared",
            "prefix_kernel: pairs.to(tl.int64) -> pairs",
            *(f"{kernel}: pair.to(tl.int64) -> pair" for kernel in WALKS),
            *(f"{kernel}: at_span.to(tl.int64) -> at_span" for kernel in WALKS),
            *(f"{kernel}: (head // groups[4]).to(tl.int64) -> head // groups[4]" for kernel in WALKS),
            *(f"out_kernel: (pair // groups[{i}]).to(tl.int64) -> pair // groups[{i}]" for i in (0, 1, 3)),
            *(f"gradient_kernel: (pair // groups[{i}]).to(tl.int64) -> pair // groups[{i}]" for i in (2, 3, 5)),
        ),
        PERFORMER,
    ),
    Argument(
        "states and sums are allocated by the launch: their columns have step 1, and fit",
        (
            "out_kernel: columns.to(tl.int64)[None, :] * state_strides[4] -> columns.to(tl.int64)[None, :]",
            "out_kernel: columns.to(tl.int64) -> columns",
            "gradient_kernel: narrow.to(tl.int64)[None, :] * state_strides[4] -> narrow.to(tl.int64)[None, :]",
            "gradient_kernel: narrow.to(tl.int64) -> narrow",
            *(f"{kernel}: rows * side_strides[3] -> rows" for kernel in WALKS),
        ),
        PERFORMER,
    ),
    Argument(
        "where W has no column, what it meets is 0; where it has no row, no power is taken",
        (f"load_projection: {W}0.0) -> {W}1)",),
        PERFORMER,
    ),
    Argument(
        "features that do not exist are 0 in what meets them, columns that do not exist are not stored",
        (f"out_kernel: {CELLS}0.0) -> {CELLS}1)", f"out_kernel: {BESIDE}0.0) -> {BESIDE}1)"),
        PERFORMER,
    ),
    Argument(
        "an absent line that is seen has the level -inf and so the weight 0, one that sees is not stored",
        (
            *(_filler("sum_kernel", of, "row") for of in ("largest", "factor", "weight")),
            *(_filler("out_kernel", f"{of}_largest", f"{of}_row") for of in "xy"),
            _filler("out_kernel", "factor", "y_row"),
            _filler("out_kernel", "bottom", "own * len_x"),
            *(_filler("gradient_kernel", f"{of}_{what}", f"line_{of}") for of in "xy" for what in ("factor", "weight")),
            *(_filler("gradient_kernel", f"{of}_largest", f"{of}_row") for of in ("z", "own")),
            *(
                f"{kernel}: tl.load(partial_ptr + spots, mask=written, other=0.0) -> tl.load(partial_ptr + spots, mask=written, other=1)"
                for kernel in WALKS
            ),
        ),
        PERFORMER,
    ),
    Argument(
        "lines after the last are hidden: a cost in time alone",
        tuple(f"{kernel}: tl.minimum(at_span * span + span, len_x) -> at_span * span + span" for kernel in WALKS),
        PERFORMER,
    ),
    Argument(
        "a hidden line's x and weight are 0, and so is what it gets: it differs only where a state is infinite",
        (f"gradient_kernel: {SHOWN} -> out",),
        PERFORMER,
    ),
    Argument(
        "the other factor is float32",
        ("out_kernel: x.to(tl.float32) -> x", "out_kernel: y.to(tl.float32) -> y", "gradient_kernel: z.to(tl.float32) -> z"),
        PERFORMER,
    ),
    Argument(
        "a sum that is rounded to bfloat16 once, within its bound",
        ("out_kernel: scores.to(tl.float32) -> scores",),
        PERFORMER,
    ),
    Argument(
        "a store casts to what the pointer points to",
        (
            "out_kernel: out.to(out_ptr.dtype.element_ty) -> out",
            f"gradient_kernel: {SHOWN}.to(out_ptr.dtype.element_ty) -> {SHOWN}",
        ),
        PERFORMER,
    ),
    Argument(
        "a program's threads wait for each other's partial sums: the interpreter has one thread for a program, so no call of it shows this",
        tuple(f"{kernel}: tl.debug_barrier() -> nothing" for kernel in WALKS),
        PERFORMER,
    ),
)
