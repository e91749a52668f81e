"""Of the carried state, which linear attention and hydra run, and of the sums of hydra's variant."""

from __future__ import annotations

from triton_attn.testing.equivalents.argument import Argument

STATE = "tl.load(base + rows[:, None] * state_strides[3] + columns[None, :] * state_strides[4], mask=there, other="
SIDES = tuple(f"tl.load(base + {of} * side_strides[3], mask={of}_there, other=" for of in ("rows", "columns"))
OWN = "tl.load(at + lines[:, None] * own_strides[2] + places[None, :] * own_strides[3], mask=kept, other="
FEATURES = "tl.load(base + lines[:, None] * strides[2] + places.to(tl.int64)[None, :] * strides[3], mask=there, other="

PADDING = "tl.load(padding_ptr + batch * strides[0] + lines * strides[1], mask=inside, other="

CELLS, SPOT = "tl.load(cells, mask=inside, other=", "tl.load(spot, mask=inside, other="

HYDRA, META = ("hydra_attention",), ("meta_hydra_attention",)
META_WALKS = ("query_kernel", "key_kernel")
BEFORE = "tl.load(before_ptr + cell * WIDTH + columns, mask=columns < WIDTH, other="

CARRIED = (
    Argument(
        "y and z of every walk and of every sum have as many heads as each other",
        (
            "walk_kernel: head_groups[2] -> head_groups[1]",
            "sum_kernel: head_groups[1] -> head_groups[0]",
            "sum_kernel: head_groups[0] -> head_groups[1]",
        ),
    ),
    Argument(
        "only a call with more than 2^31 lines or numbers in a state shows it: gigabytes that no test allocates",
        (
            *(f"{kernel}_kernel: pair.to(tl.int64) -> pair" for kernel in ("walk", "sum", "prefix")),
            *(f"{kernel}_kernel: at_span.to(tl.int64) -> at_span" for kernel in ("walk", "sum")),
            "prefix_kernel: (tl.num_programs(0) // blocks).to(tl.int64) -> tl.num_programs(0) // blocks",
        ),
    ),
    Argument(
        "only a state of more than 2^31 numbers shows it",
        (
            "state_places: (columns // PADDED * WIDTH + places).to(tl.int64) -> columns // PADDED * WIDTH + places",
            "walk_kernel: (head // head_groups[3]).to(tl.int64) -> head // head_groups[3]",
        ),
    ),
    Argument(
        "branches are members of a key head: a head of the queries is as many of the call as one of the keys",
        ("walk_kernel: head_groups[0] -> head_groups[1]", "walk_kernel: head_groups[1] -> head_groups[0]"),
        HYDRA,
    ),
    Argument("there is no initial state to begin with", ("walk_kernel: begins = lead > 0 -> nothing",), HYDRA),
    Argument("every branch carries the same state to the end, bit by bit", ("walk_kernel: if leads -> if not leads",), HYDRA),
    Argument("sums are allocated by the launch: their columns have step 1", ("walk_kernel: rows * side_strides[3] -> rows",), HYDRA),
    Argument(
        "a half of two signs writes where it is positive; linear attention's cases have one sign alone",
        ("relu_slope: tl.where(x > 0.0, 1.0, 0.0) -> 1.0",),
        HYDRA,
    ),
    Argument("one head in so many leads, and that is one or more", ("walk_kernel: lead > 0 -> lead >= 0",)),
    Argument(
        "states and sums are float32",
        (
            *(f"walk_kernel: {load}0.0).to(tl.float32) -> {load}0.0)" for load in (STATE, *SIDES)),
            f"prefix_kernel: {CELLS}0.0).to(tl.float32) -> {CELLS}0.0)",
        ),
    ),
    Argument(
        "features that do not exist are 0 in what meets them, columns that do not exist are not stored",
        tuple(f"walk_kernel: {load}0.0) -> {load}1)" for load in (STATE, *SIDES)),
    ),
    Argument("cells beyond the state are not stored", tuple(f"prefix_kernel: {load}0.0) -> {load}1)" for load in (CELLS, SPOT))),
    Argument(
        "what a line that is hidden would get is replaced by 0, a column that does not exist is not stored, and 0 and 1 are of one sign",
        (f"walk_kernel: {OWN}0.0) -> {OWN}1)",),
    ),
    Argument(
        "said twice: an absent line is hidden by `inside`, and by what its masked load gives",
        (f"visible: inside & ({PADDING}1) == 0) -> {PADDING}1) == 0", f"visible: {PADDING}1) -> {PADDING}0)"),
    ),
    Argument(
        "the factor or weight of an absent line meets features of 0, or an output that is replaced by 0",
        ("load_lines: tl.load(base + at, mask=inside, other=0.0) -> tl.load(base + at, mask=inside, other=1)",),
    ),
    Argument("what is not there is replaced by 0 at the end", (f"load_features: {FEATURES}0.0) -> {FEATURES}1)",)),
    Argument(
        "lines after the last are hidden: a cost in time alone",
        (
            "walk_kernel: tl.minimum(at_span * span + span, len_x) -> at_span * span + span",
            "sum_kernel: tl.minimum(at_span * span + span, len_y) -> at_span * span + span",
        ),
    ),
    Argument(
        "a product of tf32 cuts what is left of the bits; test_linear_attention has a quotient that shows a denominator with them",
        ("narrowed: x.to(tl.int32, bitcast=True) + 4096 & -8192 -> x.to(tl.int32, bitcast=True) + 4096",),
    ),
    Argument(
        "products in float32 are as right, and slower",
        ("narrowed: x.to(tl.bfloat16) -> x", "sum_kernel: y, z = (narrowed(y, LIKE), narrowed(z, LIKE)) -> nothing"),
    ),
    Argument("both sides are 0 at 0", ("relu: x < 0.0 -> x <= 0.0",)),
    Argument("no drawn number is 0; test_linear_attention has such queries and keys", ("relu_slope: x > 0.0 -> x >= 0.0",)),
    Argument("both sides are one at 0", tuple(f"{name}: x > 0.0 -> x >= 0.0" for name in ("elu", "elu_slope"))),
    Argument(
        "no sum has a factor for each line of y (in those of z and in the weights, the same words, it is caught), nor a scale of z",
        ("sum_kernel: row + lines -> row - lines", "sum_kernel: z_factor[:, None] * z_scale -> z_factor[:, None]"),
    ),
    Argument(
        "the other factor is float32",
        ("walk_kernel: x.to(tl.float32) -> x", "walk_kernel: z.to(tl.float32) -> z", "sum_kernel: y.to(tl.float32) -> y"),
    ),
    Argument(
        "a sum that is rounded to bfloat16 once, within its bound; test_linear_attention asks for numbers without any error",
        ("walk_kernel: scores.to(tl.float32) -> scores", "walk_kernel: y.to(tl.float32) -> y"),
    ),
    Argument(
        "a hidden line's x and weight are 0, and so is what it gets: it differs only where a state is infinite",
        (
            "walk_kernel: out = tl.where(shown[:, None], out, 0.0) -> nothing",
            "walk_kernel: tl.where(shown[:, None], out, 0.0) -> out",
        ),
    ),
    Argument(
        "outputs and states are allocated by the launch: their columns have step 1",
        ("walk_kernel: places[None, :] * out_strides[3] -> places[None, :]",),
    ),
    Argument("a store casts to what the pointer points to", ("walk_kernel: out.to(out_ptr.dtype.element_ty) -> out",)),
    Argument(
        "times after the last are hidden: a cost in time alone",
        (
            "sum_kernel: tl.minimum(at_span * span + span, length) -> at_span * span + span",
            *(f"{kernel}: tl.minimum(at_span * span + span, length) -> at_span * span + span" for kernel in META_WALKS),
        ),
        META,
    ),
    Argument(
        "only sums of more than 2^31 numbers show it, or that many in a gradient",
        (*(f"{kernel}: at_span.to(tl.int64) -> at_span" for kernel in META_WALKS), "key_kernel: pair.to(tl.int64) -> pair"),
        META,
    ),
    Argument(
        "columns that do not exist meet zeros, and are not stored",
        tuple(f"{kernel}: {BEFORE}0.0) -> {BEFORE}1)" for kernel in META_WALKS),
        META,
    ),
    Argument(
        "outputs are allocated by the launch: their columns have step 1",
        ("query_kernel: columns[None, :] * out_strides[3] -> columns[None, :]",),
        META,
    ),
    Argument(
        "a store casts to what the pointer points to",
        (
            "query_kernel: out.to(out_ptr.dtype.element_ty) -> out",
            "key_kernel: (x * asked).to(grad_value_ptr.dtype.element_ty) -> x * asked",
            "key_kernel: out.to(grad_x_ptr.dtype.element_ty) -> out",
        ),
        META,
    ),
)
