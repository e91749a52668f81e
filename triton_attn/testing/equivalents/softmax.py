"""Of the loop over keys that all softmax attention shares."""

from __future__ import annotations

from triton_attn.testing.equivalents.argument import Argument

BY_QUERY = ("forward_kernel", "backward_query_kernel")
LAST_M, LAST_N = "tl.minimum(count, BLOCK_M)", "tl.minimum(count, BLOCK_N)"
DELTA = "tl.load(delta_ptr + head.to(tl.int64) * len_m + m, mask=in_m, other="
LSE = "tl.load(lse_ptr + head.to(tl.int64) * len_m + m, mask=in_m, other="
DIAGONALS = ("causal_visits", "visits")
TOTALS = "tl.load(state_ptr + tl.cast(shares, tl.int64) * rows + at, mask=inside, other="
PARTS = "tl.load(parts_ptr + at[:, None] * E + columns[None, :], mask=inside[:, None] & (columns < E)[None, :], other="
LAST_VISIT = "tl.minimum(tl.maximum(last - numbers[0], anyone), len_m)"
ROUNDED = "tl.minimum(anyone + tl.cdiv(everyone - anyone, BLOCK) * BLOCK, len_m)"

SOFTMAX = (
    Argument(
        "visits padded keys after the last visible one, which their padding hides again",
        (
            "forward_kernel: end = tl.load(end_ptr + batch) -> nothing",
            "backward_query_kernel: end = tl.load(end_ptr + batch) -> nothing",
        ),
    ),
    Argument(
        "the rows and runs of these patterns have step 1; patterns with other steps are other rows",
        (
            *(f"{kernel}: lane_m * step -> lane_m" for kernel in BY_QUERY),
            *(f"{kernel}: (offset + lane_n) * stride -> offset + lane_n" for kernel in BY_QUERY),
            *(f"{kernel}: ({LAST_M} - 1) * step -> {LAST_M} - 1" for kernel in BY_QUERY),
            "backward_key_kernel: lane_n * step -> lane_n",
            "backward_key_kernel: (offset + lane_m) * stride -> offset + lane_m",
            f"backward_key_kernel: ({LAST_N} - 1) * step -> {LAST_N} - 1",
        ),
        ("attention", "local_global_attention", "subset_attention"),
    ),
    Argument(
        "a last row too late: the causal runs and visits end at the last key or query, and what is too much is hidden by the rule",
        (
            *(f"{kernel}: {LAST_M}{change}" for kernel in BY_QUERY for change in (f" - 1 -> {LAST_M} + 1", " -> count", " -> BLOCK_M")),
            *(f"backward_key_kernel: {LAST_N}{change}" for change in (f" - 1 -> {LAST_N} + 1", " -> count", " -> BLOCK_N")),
        ),
        ("attention", "strided_attention", "local_global_attention", "subset_attention", "dilated_attention"),
    ),
    Argument(
        "an empty run is read by nobody: the interpreter takes its descriptor, a GPU would not",
        ("forward_kernel: tl.maximum(length, 1) -> length",),
        ("attention",),
    ),
    Argument(
        "pointers read the same numbers (with what is loaded otherwise, the same words, it is caught)",
        ("forward_kernel: if DESCRIPTORS -> if not DESCRIPTORS",),
        ("attention",),
    ),
    Argument(
        "these walks do not ask which head it is (which output it is, the same words elsewhere in the kernel, is caught)",
        (
            *(f"{kernel}: head % heads -> head // heads" for kernel in BY_QUERY),
            "backward_key_kernel: shared % groups -> shared // groups",
            "backward_key_kernel: shared % groups * group -> shared % groups",
            "backward_key_kernel: h.to(tl.int32) -> h",
        ),
        ("attention", "strided_attention", "local_global_attention", "subset_attention", "attention_varlen"),
    ),
    Argument(
        "a walk that asks which head it is has the keys to itself: the group is 1; and a number of a head fits into 32 bits, and into 64",
        ("backward_key_kernel: shared % groups * group -> shared % groups", "backward_key_kernel: h.to(tl.int32) -> h"),
        ("dilated_attention",),
    ),
    Argument(
        "the number of a head fits into 32 bits, and into 64",
        ("backward_key_kernel: (batch * heads + h).to(tl.int32) -> batch * heads + h",),
    ),
    Argument(
        "a padding mask (B, N) is expanded: its step along heads is 0",
        (
            "not_padded: padding_ptr + batch * padding_strides[0] + g * padding_strides[1]"
            " -> padding_ptr + batch * padding_strides[0] - g * padding_strides[1]",
        ),
        ("attention", "strided_attention", "dilated_attention"),
    ),
    Argument(
        "said twice: an absent key is left out by `in_n`, and by what its masked load gives",
        (
            "not_padded: in_n & (tl.load(pointers, mask=in_n, other=1) == 0) -> tl.load(pointers, mask=in_n, other=1) == 0",
            "not_padded: tl.load(pointers, mask=in_n, other=1) -> tl.load(pointers, mask=in_n, other=0)",
        ),
    ),
    Argument(
        "there are no keys from elsewhere: EXTRA is false, and what is asked beside it does not count",
        (
            "forward_kernel: i == 0 -> i != 0",
            "backward_query_kernel: i == 0 -> i != 0",
        ),
        ("attention", "strided_attention"),
    ),
    Argument(
        "one counter for each key or one for four: both branches of `kept` are the same function where keys are consecutive",
        (
            "forward_kernel: not (EXTRA and i == 0) -> EXTRA and i == 0",
            "backward_query_kernel: not (EXTRA and i == 0) -> EXTRA and i == 0",
            "kept: if FOURS -> if not FOURS",
        ),
        ("attention",),
    ),
    Argument(
        "only a call whose outputs, or log-sum-exps, are more than 2^31 numbers shows it: gigabytes that no test allocates",
        (
            "forward_kernel: head.to(tl.int64) -> head",
            "forward_kernel: start.to(tl.int64) -> start",  # of the output; with queries, the same words, it is caught
            "delta_kernel: head.to(tl.int64) -> head",
            "load_lse: head.to(tl.int64) -> head",
            "backward_query_kernel: head.to(tl.int64) -> head",
            "backward_key_kernel: head.to(tl.int64) -> head",
            "store_rows: positions.to(tl.int64) -> positions",
            "forward_kernel: (tl.program_id(1) * parts + head).to(tl.int64) -> tl.program_id(1) * parts + head",
            "forward_kernel: (tl.num_programs(1) * parts).to(tl.int64) -> tl.num_programs(1) * parts",
            "merge_kernel: (first + lane).to(tl.int64) -> first + lane",
            "merge_kernel: row.to(tl.int64) -> row",
        ),
    ),
    Argument(
        "outputs and gradients are allocated by the launch, contiguous: their columns have step 1, and fit",
        (
            "store_rows: columns.to(tl.int64)[None, :] * column_stride -> columns.to(tl.int64)[None, :]",
            "store_rows: columns.to(tl.int64) -> columns",
        ),
    ),
    Argument(
        "a store casts to what the pointer points to",
        (
            "store_rows: tile.to(base.dtype.element_ty) -> tile",
            "forward_kernel: out.to(out_ptr.dtype.element_ty) -> out",
            "merge_kernel: (acc * factor).to(out_ptr.dtype.element_ty) -> acc * factor",
        ),
    ),
    Argument(
        "an absent row, finite whatever fills it, has weight 0 in every sum, or is not stored",
        (
            "load_rows: tl.load(pointers, mask=inside[:, None], other=0.0) -> tl.load(pointers, mask=inside[:, None], other=1)",
            "hide: tl.load(pointers, mask=in_m & in_n, other=0) -> tl.load(pointers, mask=in_m & in_n, other=1)",
            "delta_kernel: tl.load(pointers, mask=in_m, other=0.0) -> tl.load(pointers, mask=in_m, other=1)",
            *(f"{kernel}: {DELTA}0.0) -> {DELTA}1)" for kernel in ("backward_query_kernel", "backward_key_kernel")),
        ),
    ),
    Argument(
        "the largest and the smallest, the sum and the largest, of equal numbers, all -inf or all 0, are the same",
        (
            "merge_kernel: tl.max(tl.full([BLOCK_S], float('-inf'), tl.float32), 0)"
            " -> tl.min(tl.full([BLOCK_S], float('-inf'), tl.float32), 0)",
            "merge_kernel: tl.sum(tl.zeros([BLOCK_S], tl.float32), 0) -> tl.max(tl.zeros([BLOCK_S], tl.float32), 0)",
        ),
    ),
    Argument(
        "an absent share has the maximum -inf and so the weight 0; absent columns are not stored",
        (f"merge_kernel: {TOTALS}0.0) -> {TOTALS}1)", f"merge_kernel: {PARTS}0.0) -> {PARTS}1)"),
    ),
    Argument(
        "an absent query is 0, and so are its gradient and delta: whatever finite weight it has is multiplied by 0",
        (
            f"load_lse: {LSE}float('inf')) -> {LSE}0)",
            "load_lse: float('inf') -> 0.0",
        ),
    ),
    Argument(
        "every score of a row that sees nothing is -inf: any finite number may be subtracted (and the fillers of the same words, above)",
        ("load_lse: float('inf') -> 0.0",),
    ),
    Argument(
        "the other factor of every product is 0 in these columns: queries and gradients are loaded with CHECK",
        (
            "load_rows: tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0)"
            " -> tl.load(pointers, mask=(columns < WIDTH)[None, :], other=1)",
        ),
    ),
    Argument(
        "full tiles become edge tiles, where the rule asks what holds anyway",
        (
            "causal_runs: tl.maximum(first + numbers[0] + 1, 0) -> 0",
            "causal_runs: first + numbers[0] + 1 -> first + numbers[0] - 1",
            *(f"{walk}: {LAST_VISIT} -> len_m" for walk in DIAGONALS),
            *(f"{walk}: {ROUNDED} -> len_m" for walk in DIAGONALS),
            *(f"{walk}: everyone - anyone -> everyone + anyone" for walk in DIAGONALS),  # in that line; in what is returned it is caught
        ),
    ),
    Argument(
        "visits keys after the diagonal, or queries before it, which the rule hides",
        (
            "causal_runs: tl.minimum(tl.maximum(last + numbers[0] + 1, 0), len_n) -> len_n",
            *(f"{walk}: tl.maximum(first - numbers[0], 0) -> 0" for walk in DIAGONALS),
        ),
    ),
    Argument(
        "a run of negative length is as empty as one of none",
        (
            "causal_runs: tl.maximum(last + numbers[0] + 1, 0) -> last + numbers[0] + 1",
            *(f"{walk}: tl.minimum(tl.maximum(first - numbers[0], 0), len_m) -> tl.maximum(first - numbers[0], 0)" for walk in DIAGONALS),
            "share: tl.minimum(tl.program_id(1) * each, length) -> tl.program_id(1) * each",
        ),
    ),
    Argument(
        "the next line rounds up and ends at the last query",
        tuple(f"{walk}: {LAST_VISIT} -> tl.maximum(last - numbers[0], anyone)" for walk in DIAGONALS),
    ),
    Argument(
        "the two runs of queries meet elsewhere, and either may end within a tile",
        tuple(f"{walk}: everyone = {ROUNDED} -> nothing" for walk in DIAGONALS),
    ),
    Argument(
        "the other operand is float32 already, or the value is: the operation promotes",
        (
            "hide: entry.to(tl.float32) -> entry",
            "delta_kernel: out.to(tl.float32) -> out",
            "delta_kernel: grad.to(tl.float32) -> grad",
            "delta_kernel: tl.load(pointers, mask=in_m, other=0.0).to(tl.float32) -> tl.load(pointers, mask=in_m, other=0.0)",
        ),
    ),
    Argument(
        "32 bits are 32 bits: the sum with an unsigned zero is unsigned, and half a word is below 2^31 with or without sign",
        (
            "kept: quarter.to(tl.uint32) -> quarter",
            "kept: (keys // 4).to(tl.uint32) -> keys // 4",
            "kept: queries.to(tl.uint32) -> queries",
            "kept: head.to(tl.uint32) -> head",
            "kept: (words >> 1).to(tl.int32) -> words >> 1",
        ),
    ),
    Argument(
        "the counters broadcast against each other",
        ("kept: queries.shape[0] -> queries.shape[1]",),
    ),
    Argument(
        "one word in 2^31 equals the threshold",
        ("kept: (words >> 1).to(tl.int32) >= threshold -> (words >> 1).to(tl.int32) > threshold",),
    ),
)
