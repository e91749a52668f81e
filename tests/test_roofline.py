"""The roofline's predictions: what must hold whatever the numbers, and facts that others have published."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_attn import CATALOG, ArgumentError, device
from triton_attn.device import LIMITS, PEAKS
from triton_attn.mechanism import Case, Launch
from triton_attn.offline import Part
from triton_attn.tiles import Tile, Usage
from triton_attn.tuning import roofline
from triton_attn.tuning.roofline import Demand

KIB, A100, H100 = 1024, (8, 0), (9, 0)
ROW = CATALOG["attention"]
FORWARD, DQ, DKV = Launch("forward"), Launch("backward_query", ("query",)), Launch("backward_key", ("key", "value"))
TARGETS, LAUNCHES = st.sampled_from(sorted(PEAKS)), st.sampled_from((FORWARD, DQ, DKV))
TILES = st.builds(Tile, *(st.sampled_from((16, 32, 64, 128)),) * 2, st.sampled_from((1, 2, 4, 8)), st.integers(1, 4))
USAGES = st.builds(
    Usage,
    registers=st.integers(16, 255),
    spilled=st.just(0),
    shared=st.integers(0, 160 * KIB),
    warps=st.sampled_from((1, 2, 4, 8, 12)),
    tensor_core=st.integers(0, 64),
    asynchronous=st.integers(0, 8),
)
DEMANDS = st.builds(Demand, *(st.floats(0, 1e15),) * 5)
CASES = st.builds(
    lambda length, causal, **sizes: Case(
        "drawn", {**sizes, "g": sizes["h"], "m": length, "n": length, "e": sizes["d"]}, {"causal": causal}
    ),
    st.integers(1, 3000),
    st.booleans(),
    b=st.integers(1, 40),
    h=st.integers(1, 40),
    d=st.integers(1, 256),
)


def milliseconds(asked: Demand, usage: Usage, programs: int, capability: tuple[int, int], **options: int) -> float:
    return roofline.predict(asked, [Part(programs, usage)], "16bit", PEAKS[capability], LIMITS[capability], **options).milliseconds


def of_case(case: Case, launch: Launch, tile: Tile, usage: Usage, capability: tuple[int, int]) -> float:
    """The prediction with the grid that such a launch has."""
    length, block = (case.sizes["n"], tile.block_n) if launch is DKV else (case.sizes["m"], tile.block_m)
    programs = case.sizes["b"] * case.sizes["h"] * math.ceil(length / block)
    profile = device.Profile("", capability)
    return roofline.predict_tile(ROW, launch, case, "16bit", tile, [Part(programs, usage)], profile).milliseconds


@given(
    case=CASES,
    launch=LAUNCHES,
    tile=TILES,
    usage=USAGES,
    capability=TARGETS,
    axes=st.sampled_from(("b", "hg", "mn", "de")),
    more=st.integers(1, 500),
)
def test_a_larger_call_is_never_predicted_faster(
    case: Case, launch: Launch, tile: Tile, usage: Usage, capability: tuple[int, int], axes: str, more: int
) -> None:
    larger = replace(case, sizes={axis: size + more * (axis in axes) for axis, size in case.sizes.items()})
    assert of_case(larger, launch, tile, usage, capability) >= of_case(case, launch, tile, usage, capability) * (1 - 1e-12)


@given(
    asked=DEMANDS,
    usage=USAGES,
    programs=st.integers(1, 5000),
    capability=TARGETS,
    unit=st.sampled_from(("flops", "bytes", "streamed", "shared", "exponentials")),
)
def test_more_of_any_work_is_never_predicted_faster(
    asked: Demand, usage: Usage, programs: int, capability: tuple[int, int], unit: str
) -> None:
    more = replace(asked, **{unit: getattr(asked, unit) * 1.5 + 1})
    assert milliseconds(more, usage, programs, capability) >= milliseconds(asked, usage, programs, capability)


@given(asked=DEMANDS, usage=USAGES, programs=st.integers(1, 5000), more=st.integers(1, 5000), capability=TARGETS)
def test_more_programs_of_the_same_work_are_never_faster_and_a_wave_more_is_slower(
    asked: Demand, usage: Usage, programs: int, more: int, capability: tuple[int, int]
) -> None:
    def of(count: int) -> float:
        scaled = Demand(*(each * count / programs for each in (asked.flops, asked.bytes, asked.streamed, asked.shared, asked.exponentials)))
        return milliseconds(scaled, usage, count, capability)

    assert of(programs + more) >= of(programs) * (1 - 1e-9)
    wave = PEAKS[capability].multiprocessors * 32  # at the most
    if math.isfinite(of(programs)) and asked.flops >= 1e9:
        assert of(programs + wave) > of(programs)


@given(asked=DEMANDS, usage=USAGES, programs=st.integers(1, 5000), capability=TARGETS)
def test_what_hides_less_is_never_faster(asked: Demand, usage: Usage, programs: int, capability: tuple[int, int]) -> None:
    best = milliseconds(asked, usage, programs, capability, stages=4)
    assert milliseconds(asked, usage, programs, capability, stages=1) >= best
    assert milliseconds(asked, replace(usage, asynchronous=0), programs, capability, stages=4) >= best
    assert milliseconds(asked, replace(usage, tensor_core=0), programs, capability, stages=4) >= best


@given(asked=DEMANDS, usage=USAGES, programs=st.integers(1, 5000), capability=TARGETS)
def test_no_prediction_beats_the_slowest_unit(asked: Demand, usage: Usage, programs: int, capability: tuple[int, int]) -> None:
    peaks = PEAKS[capability]
    least = max(asked.flops / peaks.tensor, asked.bytes / peaks.bandwidth, asked.exponentials / peaks.exponentials)
    assert milliseconds(asked, usage, programs, capability) >= 1e3 * least * (1 - 1e-12)


@pytest.mark.parametrize(
    "usage",
    [Usage(128, 8, KIB, 4, 8, 8), Usage(128, 0, 230 * KIB, 4, 8, 8), Usage(128, 0, KIB, 4, 8, 8, atomics=1)],
    ids=["spills", "does not fit", "adds atomically"],
)
def test_what_may_not_run_takes_for_ever(usage: Usage) -> None:
    assert milliseconds(Demand(1e9, 1e9, 1e9, 1e9, 1e9), usage, 100, H100) == math.inf
    assert roofline.predict(Demand(1, 1, 1, 1, 1), [], "16bit", PEAKS[H100], LIMITS[H100]).milliseconds == math.inf


def test_a_second_kernel_costs_a_launch() -> None:
    asked, main, merge = Demand(1e10, 1e8, 1e8, 0, 0), Part(500, Usage(128, 0, KIB, 4, 8, 8)), Part(90, Usage(32, 0, 0, 4, 0, 0))
    one, both = (roofline.predict(asked, parts, "16bit", PEAKS[A100], LIMITS[A100]).milliseconds for parts in ([main], [merge, main]))
    assert both - one == pytest.approx(1e3 * roofline.LAUNCH)


def test_exact_float32_is_slower_than_tf32_and_that_than_16_bits() -> None:
    asked, usage = Demand(1e13, 1e6, 0, 0, 0), Usage(128, 0, KIB, 8, 8, 8)

    def of(operands: str, used: Usage) -> float:
        return roofline.predict(asked, [Part(1080, used)], operands, PEAKS[A100], LIMITS[A100]).milliseconds

    assert of("16bit", usage) < of("tf32", usage) < of("float32", replace(usage, tensor_core=0))


# what others measured or compiled

DENSE = {64: Case("dense", {"b": 1, "h": 32, "g": 32, "m": 16384, "n": 16384, "d": 64, "e": 64}), 128: ROW.workloads["cuda"][0]}
# triton 3.6.0, sm_80, bfloat16, a plain forward kernel: tile, registers, spilled bytes, KiB of shared memory
COMPILED = {
    64: [
        (Tile(128, 64, 4, 3), 250, 0, 48),
        (Tile(128, 64, 8, 3), 128, 8, 48),
        (Tile(128, 32, 4, 4), 200, 0, 40),
        (Tile(64, 64, 4, 3), 144, 0, 40),
    ],
    128: [
        (Tile(128, 64, 4, 3), 255, 240, 96),
        (Tile(128, 64, 8, 3), 218, 0, 96),
        (Tile(128, 32, 4, 4), 255, 40, 80),
        (Tile(64, 64, 4, 3), 238, 0, 88),
    ],
}


@pytest.mark.parametrize(("width", "best"), [(64, Tile(128, 64, 4, 3)), (128, Tile(128, 64, 8, 3))])
def test_on_a100_flexattentions_tile_comes_first_of_those_compiled_and_what_spills_last(width: int, best: Tile) -> None:
    """FlexAttention's tables for A100: 128x64 with 4 warps and 3 stages for heads of 64, with 8 warps for heads of 128."""
    times = {
        tile: of_case(DENSE[width], FORWARD, tile, Usage(registers, spilled, kib * KIB, tile.num_warps, 32, 8), A100)
        for tile, registers, spilled, kib in COMPILED[width]
    }
    assert min(times, key=times.__getitem__) == best
    assert [tile for tile, time in times.items() if time == math.inf] == [tile for tile, _, spilled, _ in COMPILED[width] if spilled]


def test_on_a100_a_warp_of_16_rows_reads_operands_twice_as_often_as_one_of_32_and_on_h100_four_warps_read_together() -> None:
    def shared(tile: Tile, capability: tuple[int, int]) -> float:
        return roofline.demand(ROW, FORWARD, DENSE[64], "16bit", tile, capability).shared

    assert shared(Tile(64, 64, 4, 3), A100) == 2 * shared(Tile(128, 64, 4, 3), A100) == shared(Tile(128, 64, 8, 3), A100)
    assert shared(Tile(64, 64, 4, 3), H100) == shared(Tile(128, 64, 4, 3), H100) == shared(Tile(128, 64, 8, 3), H100)
    assert shared(Tile(64, 64, 4, 3), H100) == shared(Tile(64, 64, 4, 3), A100) / 4


def test_a_window_of_129_keys_visits_225_with_small_tiles_and_three_times_as_many_with_large_ones() -> None:
    """As counted for a window of 64 to either side: 64x32 visits about 225 keys for each query, 128x128 about 384."""
    row = CATALOG["local_global_attention"]
    case = next(case for case in row.workloads["cuda"] if case.options["window"] == 128)
    useful = row.work(case.sizes, {**row.defaults, **case.options}, 2).flops
    small, large = (
        roofline.demand(row, FORWARD, case, "16bit", Tile(*block, 4, 2), H100).flops / useful * 129 for block in ((64, 32), (128, 128))
    )
    assert small == pytest.approx(225, rel=0.01)
    assert large == pytest.approx(384, rel=0.01)
    same = Usage(128, 0, 40 * KIB, 4, 32, 8)
    times = [
        roofline.predict_tile(
            row, FORWARD, case, "16bit", Tile(*block, 4, 2), [Part(16 * 16384 // block[0], same)], device.Profile("", H100)
        )
        for block in ((64, 32), (128, 128))
    ]
    assert times[0].milliseconds < times[1].milliseconds


def test_dense_attention_is_bound_by_products_and_a_norm_by_memory() -> None:
    usage = Usage(200, 0, 160 * KIB, 8, 32, 8)
    case = DENSE[128]
    found = roofline.predict_tile(ROW, FORWARD, case, "16bit", Tile(128, 128, 8, 2), [Part(16 * 128, usage)], device.Profile("", H100))
    assert found.bound == "products"
    assert 4 * 16 * 16384**2 * 128 / PEAKS[H100].tensor < found.milliseconds / 1e3 < 3 * 4 * 16 * 16384**2 * 128 / PEAKS[H100].tensor
    norm = CATALOG["add_layer_norm"]
    rows = norm.workloads["cuda"][1]
    found = roofline.predict_tile(
        norm, FORWARD, rows, "16bit", Tile(4, 2, 4, 1), [Part(8192, replace(usage, tensor_core=0))], device.Profile("", H100)
    )
    assert found.bound == "memory"


def test_a_split_backward_pass_does_seven_products_to_the_forwards_two() -> None:
    tile = Tile(128, 128, 8, 2)
    forward, *backward = (roofline.demand(ROW, launch, DENSE[128], "16bit", tile, H100).flops for launch in (FORWARD, DQ, DKV))
    assert sum(backward) / forward == pytest.approx(3.5)


def test_a_device_without_peaks_is_refused_and_a_smaller_one_scaled() -> None:
    with pytest.raises(ArgumentError, match="target is 'sm_86'; allowed: sm_80, sm_90"):
        roofline.peaks_of(device.Profile("", (8, 6)))
    half = roofline.peaks_of(device.Profile("NVIDIA H100 of half the size", H100, multiprocessors=66))
    assert (half.tensor, half.bandwidth) == (PEAKS[H100].tensor / 2, PEAKS[H100].bandwidth)


# rank correlation


@given(st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=30, unique=True), st.randoms(use_true_random=False))
def test_rank_correlation_asks_for_the_order_alone(values: list[float], chance: random.Random) -> None:
    order = sorted(values)
    cubed = [order.index(value) ** 3 for value in values]
    assert roofline.spearman(values, cubed) == pytest.approx(1.0)
    assert roofline.spearman(values, [-each for each in cubed]) == pytest.approx(-1.0)
    other = chance.sample(values, len(values))
    apart = sum((order.index(a) - order.index(b)) ** 2 for a, b in zip(values, other, strict=True))
    n = len(values)
    assert roofline.spearman(values, other) == pytest.approx(1 - 6 * apart / (n * (n * n - 1)))


def test_rank_correlation_of_ties_and_of_too_little() -> None:
    assert roofline.spearman([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(0.9486832980505138)  # scipy.stats.spearmanr
    assert roofline.spearman([1, 2], [1, 2]) is None
    assert roofline.spearman([1, 1, 1], [1, 2, 3]) is None
    with pytest.raises(ArgumentError, match="other has 2 values; allowed: 3"):
        roofline.spearman([1, 2, 3], [1, 2])
