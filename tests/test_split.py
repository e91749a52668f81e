"""Few queries and many keys: programs share the keys, and heads that share keys are rows of one. Every row, every option."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.test_dispatch import on_cuda
from triton_attn import CATALOG, attention, device, explain, verify
from triton_attn.mechanism import Case, Mechanism
from triton_attn.testing import inputs, numerics
from triton_attn.tiles import Tile

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("strict")
CPU = torch.device("cpu")
ROW = CATALOG["attention"]
CODE = ROW.kernels[-1].load()
SPLIT = [
    pytest.param(row, case, dtype, id=f"{row.name}-{case.name}-{dtype}", marks=[pytest.mark.slow] if place % 2 else [])
    for row in CATALOG.values()
    if "lse" in row.outputs
    for first, case in enumerate(row.cases)
    for place, dtype in enumerate((torch.float32, torch.bfloat16), first)  # one of them in the quick run
    if not case.options.get("detach_mixing")  # which is of the backward pass
]
TILE = Tile(16, 16, 4, 1, splits=3)
H100 = device.Profile("NVIDIA H100", (9, 0), multiprocessors=132)


def judged(row: Mechanism, case: Case, tile: Tile | None, dtype: torch.dtype = torch.float16, **drawn: Any) -> None:
    run = verify.kernel_run(row, row.kernels[-1].load(), tile)
    numerics.assert_right(verify.judge(row, case, run, dtype=dtype, where=CPU, **drawn), (case, dtype, tile, drawn))


@pytest.mark.parametrize(("row", "case", "dtype"), SPLIT)
def test_shares_merge_to_what_one_program_computes(row: Mechanism, case: Case, dtype: torch.dtype) -> None:
    """The forward pass alone: the backward pass knows nothing of shares."""
    code = row.kernels[-1].load()
    tensors, options = inputs.draw(row, case, dtype=dtype)
    options.setdefault("scale", None)
    expected = verify.expect(row, tensors, options, case.sizes, dtype=dtype)
    outputs = code.forward(**tensors, **options, **{row.more: True}, tile=TILE)
    for name, found in zip(row.outputs, outputs, strict=True):
        how: dict[str, Any] = {"dtype": dtype, "yardstick": expected.naive.get(name), "context": (case, dtype)}
        numerics.assert_matches(name, found, expected.truth[name], expected.size[name], **how)


@pytest.mark.parametrize("splits", [2, 7, pytest.param(40, marks=pytest.mark.slow)])
def test_there_may_be_more_shares_than_tiles_of_keys_or_than_a_merge_reads_at_once(splits: int) -> None:
    for case in ROW.cases[:4]:
        judged(ROW, case, replace(TILE, splits=splits))


def test_a_tile_by_launch_name_asks_for_the_split_launch_as_the_compile_gate_does() -> None:
    tensors, options = inputs.draw(ROW, ROW.cases[0])
    named, asked = (CODE.forward(**tensors, **options, tile=tile) for tile in ({"split": replace(TILE, splits=1)}, replace(TILE, splits=2)))
    assert torch.equal(named, asked)


def test_a_split_call_gives_the_same_bits_every_time() -> None:
    tensors, options = inputs.draw(ROW, ROW.cases[1])
    first, second = (CODE.forward(**tensors, **options, return_lse=True, tile=TILE) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_shares_drop_what_one_program_drops() -> None:
    """Values that are the identity show every weight."""
    query, key = torch.randn(1, 2, 20, 16), torch.randn(1, 2, 40, 16)
    value, seed = torch.eye(40).expand(1, 2, 40, 40), torch.tensor(11)
    nothing: dict[str, Any] = {"mask": None, "key_padding_mask": None, "causal": "", "scale": None}
    whole, shared = (
        CODE.forward(query, key, value, **nothing, dropout_p=0.4, seed=seed, tile=tile) for tile in (replace(TILE, splits=1), TILE)
    )
    assert 0.3 < (whole == 0).float().mean() < 0.5
    assert torch.equal(whole == 0, shared == 0)


def test_shares_are_weighted_exactly_where_a_huge_mask_swallows_the_number_of_keys() -> None:
    """Every key at finfo.min: a log-sum-exp in float32 could not tell a share of 16 keys from one of 1."""
    tensors, _ = inputs.draw(ROW, Case("", {"b": 1, "h": 1, "g": 1, "m": 3, "n": 33, "d": 16, "e": 16}))
    tensors["mask"] = torch.full((1, 1, 3, 33), torch.finfo(torch.float32).min)
    tensors["query"] = torch.zeros(1, 1, 3, 16)
    out = CODE.forward(**tensors, tile=TILE)
    torch.testing.assert_close(out, tensors["value"].mean(2, keepdim=True).expand_as(out))  # type: ignore[union-attr]


def test_nan_in_one_query_stays_in_its_row() -> None:
    tensors, options = inputs.draw(ROW, ROW.cases[0])
    tensors["query"][0, 0, 5] = torch.nan  # type: ignore[index]
    out = CODE.forward(**tensors, **options, tile=TILE)
    assert out[0, 0, 5].isnan().all()
    out[0, 0, 5] = 0.0
    assert out.isfinite().all()


# heads that share keys


GROUPED = {
    "one query": {"m": 1},
    "one query, causal": {"m": 1, "causal": "bottom_right"},
    "one query, boolean mask": {"m": 1, "mask": "boolean"},
    "one query, additive mask": {"m": 1, "mask": "additive"},
    "one query, padded keys": {"m": 1, "key_padding_mask": "random"},
    "five queries": {"m": 5},
    "five queries, padded keys": {"m": 5, "key_padding_mask": "random"},
    "five queries, a mask for each": {"m": 5, "mask": "additive"},
}
APART = {
    "many queries": {"m": 16},
    "a mask shared by heads": {"m": 5, "mask": "boolean", "shared": True},
    "causal": {"m": 5, "causal": "bottom_right"},
    "one query from the top left": {"m": 1, "causal": "top_left"},
    "dropout": {"m": 1, "dropout_p": 0.3},
    "interleaved heads": {"m": 5, "layout": inputs.LAYOUTS[1]},
}


def grouped_call(m: int, layout: str = inputs.CONTIGUOUS, shared: bool = False, **options: Any) -> tuple[Case, str, bool]:
    return Case("grouped", {"b": 2, "h": 6, "g": 2, "m": m, "n": 40, "d": 16, "e": 24}, options), layout, shared


@pytest.mark.parametrize("how", GROUPED.values(), ids=GROUPED.keys())
@pytest.mark.parametrize("tile", [None, TILE], ids=["whole", "split"])
def test_heads_that_share_keys_are_rows_of_one(how: dict[str, Any], tile: Tile | None) -> None:
    case, layout, _ = grouped_call(**how)
    rows = rows_of(case, layout)
    assert rows.shape == (2, 2, 3 * case.sizes["m"], 16)
    judged(ROW, case, tile)


@pytest.mark.parametrize("how", APART.values(), ids=APART.keys())
def test_heads_stay_apart_where_rows_of_one_would_need_a_copy_or_another_rule(how: dict[str, Any]) -> None:
    case, layout, shared = grouped_call(**how)
    assert rows_of(case, layout, shared).shape == (2, 6, case.sizes["m"], 16)
    judged(ROW, case, TILE, layout=layout)


def rows_of(case: Case, layout: str, shared: bool = False) -> Tensor:
    """The query as the kernel gets it, which is a view."""
    from triton_attn.kernels._softmax_riders import Extras
    from triton_attn.kernels.attention import grouped

    tensors, options = inputs.draw(ROW, case, layout=layout)
    mask = tensors["mask"] if not shared else tensors["mask"][:, :1]  # type: ignore[index]
    query: Any = tensors["query"]
    extras = Extras.of(query, mask, tensors["key_padding_mask"], None, options.get("dropout_p", 0.0), tensors["seed"])
    rows, causal, _ = grouped(query, tensors["key"], options.get("causal", ""), extras)  # type: ignore[arg-type]
    assert rows.data_ptr() == query.data_ptr()
    assert not causal or rows is query
    return rows


# when


@given(st.integers(1, 200), st.integers(0, 10**6), st.sampled_from((16, 32, 64, 128)), st.integers(1, 200))
def test_no_share_is_empty_or_small_and_their_programs_fit_the_gpu_twice(programs: int, keys: int, block: int, processors: int) -> None:
    from triton_attn.kernels._softmax_choice import FEWEST_KEYS, share_count

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "profile", lambda index: replace(H100, multiprocessors=processors))
        shares = share_count(on_cuda(torch.zeros(1)), programs, keys, block)
    tiles = -(-keys // block)
    each = -(-tiles // shares)
    assert shares >= 1
    assert shares == 1 or (shares - 1) * each < tiles <= shares * each
    assert shares == 1 or (shares * programs <= 2 * processors and keys >= shares * FEWEST_KEYS)


def explained(monkeypatch: pytest.MonkeyPatch, b: int, h: int, g: int, m: int, n: int, d: int, **options: Any) -> Any:
    monkeypatch.setattr(device, "profile", lambda index: H100)
    query, key = (on_cuda(torch.zeros(1, dtype=torch.bfloat16).expand(shape)) for shape in ((b, h, m, d), (b, g, n, d)))
    return explain(attention, query, key, key, **options)


@pytest.mark.parametrize(
    ("sizes", "shares"),
    [((1, 32, 8, 1, 32768, 128), 32), ((1, 8, 8, 77, 1369, 96), 6), ((64, 32, 8, 1, 32768, 128), 1), ((1, 8, 8, 77, 77, 64), 1)],
)
def test_keys_are_shared_where_most_of_the_gpu_would_idle(monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...], shares: int) -> None:
    found = explained(monkeypatch, *sizes)
    assert ("split" in found.tiles) == (shares > 1)
    assert ("forward" in found.tiles) == (shares == 1)
    assert shares == 1 or f"{shares} programs share the keys of each query" in str(found)


def test_bulk_copies_leave_shared_keys_to_pointers_and_explain_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "profile", lambda index: H100)
    query, key = (on_cuda(torch.zeros(shape, dtype=torch.bfloat16)) for shape in ((1, 8, 1, 64), (1, 2, 4096, 64)))
    found = explain(attention, query, key, key)
    assert found.kernel == "pointers"
    assert "programs share the keys" in " ".join(found.reasons["descriptors"])
