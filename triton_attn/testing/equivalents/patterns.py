"""Of the walks of sparse patterns over the loop that all softmax attention shares."""

from __future__ import annotations

from triton_attn.testing.equivalents.argument import Argument
from triton_attn.testing.equivalents.softmax import LAST_M, LAST_N

RUN = "tl.minimum({} + numbers[0] + 1, end) - low"
QUERIES, BEFORE = "tl.minimum(segment + length, len_m) - segment - phase", "(first - numbers[0] - segment - phase) // rate"
SEEN_BY_ALL = "last - numbers[0] - segment - phase"
ALL = f"tl.cdiv(tl.maximum({SEEN_BY_ALL} - before * rate, 0), rate)"
DIAGONAL = f"tl.minimum({ALL}, total - before)"
FIRST_AT, LAST_AT = "tl.min(tl.where(in_n, n, len_n))", "tl.max(tl.where(in_n, n, -1))"

PATTERNS = (
    Argument(
        "fewer keys that every row sees, or more that one may see: what is left over goes through the edge's mask, at a cost in time alone",
        (
            "runs: tl.maximum(tl.minimum(first + numbers[0] + 1, end) - low, 0) -> 0",
            "runs: tl.minimum(last + numbers[0] + 1, end) -> end",
            "visits: last - numbers[0] -> last + numbers[0]",
        ),
        ("dilated_attention",),
    ),
    Argument(
        "a phase of -1 is nobody's remainder; a row that selects the branch, or a key in it, is at or after the first of its phase, before"
        " the end of its segment",
        (
            "runs: (offset >= 0) & ((first - segment) % rate == offset) -> (first - segment) % rate == offset",
            *(f"runs: tl.maximum({RUN.format(row)}, 0) -> {RUN.format(row)}" for row in ("first", "last")),
            f"visits: tl.maximum({QUERIES}, 0) -> {QUERIES}",
            f"visits: tl.minimum({BEFORE}, total) -> {BEFORE}",
        ),
        ("dilated_attention",),
    ),
    Argument(
        "fewer keys that every row sees, queries that see none visited too, more queries on the diagonal: the rule hides them",
        (
            "runs: first + numbers[0] + 1 -> first + numbers[0] - 1",
            "runs: first + numbers[0] -> first - numbers[0]",
            f"visits: tl.maximum(tl.minimum({BEFORE}, total), 0) -> 0",
            f"visits: {BEFORE} -> {BEFORE.replace('//', '%')}",
            f"visits: {DIAGONAL} -> total - before",
            f"visits: {SEEN_BY_ALL} - before * rate -> {SEEN_BY_ALL} + before * rate",
            f"visits: {SEEN_BY_ALL} -> last - numbers[0] - segment + phase",
            "visits: last - numbers[0] - segment -> last - numbers[0] + segment",
            "visits: before * rate -> before",  # in that line; elsewhere it is caught
            "visits: diagonal = tl.minimum(tl.cdiv(diagonal, BLOCK) * BLOCK, total - before) -> nothing",
            "visits: tl.minimum(tl.cdiv(diagonal, BLOCK) * BLOCK, total - before) -> total - before",
        ),
        ("dilated_attention",),
    ),
    Argument(
        "the next line ends the diagonal at the last query, too",
        (f"visits: {DIAGONAL} -> {ALL}", "visits: total - before -> total + before"),
        ("dilated_attention",),
    ),
    Argument(
        "a query that sees its own key has as many keys beside it as queries; and the rule hides the others",
        tuple(f"runs: tl.minimum(last + 1, len_n) -> {end}" for end in ("last + 1", "len_n")),
        ("strided_attention", "subset_attention"),
    ),
    Argument(
        "the own keys' run begins earlier, at another multiple of four, tiles having 16 rows and more: the rule hides what is too much",
        ("runs: first // 4 * 4 -> first // 4", "runs: first // 4 -> first % 4"),
        ("subset_attention",),
    ),
    Argument(
        "the subset is a copy of its keys and values: columns have step 1",
        (
            "load_extra: strides[0] -> strides[1]",  # of the columns; of items, the same words, it is caught
            "load_extra: strides[1] -> strides[0]",
        ),
        ("subset_attention",),
    ),
    Argument(
        "positions are made for the call: they have step 1, and fit",
        ("standing_for: n.to(tl.int64) * positions_strides[2] -> n.to(tl.int64)", "standing_for: n.to(tl.int64) -> n"),
        ("local_global_attention", "subset_attention"),
    ),
    Argument(
        "a last key too late: queries are visited with the rule that need none, or all of them where no key of the tile is there",
        ("backward_key_kernel: -1 -> 1",),
        ("subset_attention",),
    ),
    Argument(
        "keys outside of the band, or fewer full tiles of it, in any of the three runs: the rule hides what is too much",
        (
            "local_runs: tl.maximum(first - numbers[0], numbers[2]) -> numbers[2]",
            "local_runs: tl.minimum(last + numbers[1] + 1, len_n) -> len_n",
            "local_runs: numbers[1] -> numbers[0]",  # of the last key; of the last full tile, the same words, it is caught
            "local_runs: last - numbers[0] -> last + numbers[0]",
            "local_runs: numbers[0] -> numbers[1]",  # of the first full tile
            "local_runs: first + numbers[1] + 1 -> first + numbers[1] - 1",
            "local_runs: first + numbers[1] -> first - numbers[1]",
            "banded: tl.minimum(low + tl.cdiv(tl.maximum(seen_from - low, 0), BLOCK) * BLOCK, high) -> high",
            "banded: seen_from - low -> seen_from + low",
            "banded: tl.maximum(tl.minimum(seen_to, high) - inner, 0) -> 0",
        ),
        ("local_global_attention",),
    ),
    Argument(
        "the launch has no more global tokens than there are queries",
        ("global_rows: tl.minimum(numbers[1], length) -> numbers[1]", "local_visits: tl.minimum(numbers[2], len_m) -> numbers[2]"),
        ("local_global_attention",),
    ),
    Argument(
        "visits queries outside of the band, which the rule hides: a cost in time alone",
        (
            "local_visits: tl.minimum(last + numbers[0] + 1, len_m) -> len_m",
            "local_visits: tl.maximum(tl.where(everyone, 0, first - numbers[1]), numbers[2]) -> numbers[2]",
            "local_visits: first < numbers[2] -> first <= numbers[2]",
            "local_visits: numbers[1] -> numbers[0]",  # of the first query; elsewhere, the same words, it is caught
            "local_visits: tl.where(everyone, 0, first - numbers[1]) -> 0",
            "local_visits: tl.where(everyone, 0, first - numbers[1]) -> tl.where(everyone, first - numbers[1], 0)",
            "local_visits: tl.where(everyone, len_m, tl.minimum(last + numbers[0] + 1, len_m)) -> len_m",
        ),
        ("local_global_attention",),
    ),
    Argument(
        "fewer full tiles of queries; or of a tile with a global key those that see all of it",
        (
            "local_visits: first + numbers[0] + 1 -> first + numbers[0] - 1",
            "local_visits: first + numbers[0] -> first - numbers[0]",
            "local_visits: numbers[0] -> numbers[1]",  # of the last full tile; of the last query, the same words, it is caught
            "local_visits: last - numbers[1] -> last + numbers[1]",
            "local_visits: tl.where(everyone, high, last - numbers[1]) -> high",
            "local_visits: tl.where(everyone, high, last - numbers[1]) -> tl.where(everyone, last - numbers[1], high)",
        ),
        ("local_global_attention",),
    ),
    Argument(
        "the queries of keys from elsewhere are all queries: which of their keys is the first does not count, and all of them are there",
        (
            f"backward_key_kernel: {FIRST_AT} -> {FIRST_AT.replace('tl.min', 'tl.max')}",
            f"backward_key_kernel: {LAST_AT} -> {LAST_AT.replace('tl.max', 'tl.min')}",
            "backward_key_kernel: tl.where(in_n, n, len_n) -> tl.where(in_n, len_n, n)",
            "backward_key_kernel: tl.where(in_n, n, len_n) -> n",
            "backward_key_kernel: tl.where(in_n, n, -1) -> tl.where(in_n, -1, n)",
            "backward_key_kernel: tl.where(in_n, n, -1) -> n",
            "backward_key_kernel: -1 -> 1",
            "backward_key_kernel: if SCATTER -> if not SCATTER",
        ),
        ("local_global_attention",),
    ),
    Argument(
        "a last row too late: rows begin and end later and later, so that fewer keys are seen by all and more looked at by the rule",
        (
            f"forward_kernel: {LAST_M} -> count",
            f"backward_query_kernel: {LAST_M} -> count",
            f"backward_key_kernel: {LAST_N} -> count",
        ),
        ("attention_varlen",),
    ),
    Argument(
        "fewer keys that every row sees, or more that one may see, which the rule looks at",
        ("spans: tl.maximum(until - everyone, 0) -> 0", "spans: tl.minimum(everyone, end) -> everyone"),
        ("attention_varlen",),
    ),
    Argument(
        "an absent query has weight 0 in every sum, and is not stored",
        tuple(f"keep: tl.load(numbers[{i}] + m, mask=inside, other=0) -> tl.load(numbers[{i}] + m, mask=inside, other=1)" for i in (0, 1)),
        ("attention_varlen",),
    ),
)
