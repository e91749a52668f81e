"""Tiles: how they are written, which are legal, how many fit a multiprocessor, and what they depend on."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_attn import device, tiles
from triton_attn.device import LIMITS
from triton_attn.tiles import Key, Tile, Usage

BLOCKS, WARPS, STAGES = (16, 32, 64, 128, 256), (1, 2, 4, 8), (1, 2, 3, 4, 5)
SCHEDULED = (st.sampled_from(WARPS), st.sampled_from(STAGES), st.booleans())
LEGAL = st.builds(Tile, st.sampled_from(BLOCKS), st.sampled_from(BLOCKS), *SCHEDULED, st.integers(1, 999))


@given(LEGAL)
def test_a_tile_is_what_its_text_says(tile: Tile) -> None:
    assert Tile.parse(str(tile)) == tile


@given(LEGAL, LEGAL)
def test_two_tiles_never_share_a_text(one: Tile, other: Tile) -> None:
    assert (str(one) == str(other)) == (one == other)


def mistyped(text: str, at: int, typed: str, cut: int) -> str:
    return text[:at] + typed + text[at + cut :]


NEAR_MISSES = st.builds(mistyped, LEGAL.map(str), st.integers(0, 16), st.text(alphabet="01268xws/ -\n٦", max_size=2), st.integers(0, 2))


def parsed(text: str) -> Tile | None:
    try:
        return Tile.parse(text)
    except ValueError:
        return None


@given(st.text() | NEAR_MISSES)
def test_any_text_is_refused_or_the_one_spelling_of_a_tile(text: str) -> None:
    tile = parsed(text)
    assert tile is None or str(tile) == text


REFUSED = {
    "nothing": "",
    "a block that is no power of two": "48x64 w4 s3",
    "a block of no rows": "0x64 w4 s3",
    "a block of one": "1x64 w4 s3",
    "a block above 256": "512x64 w4 s3",
    "three warps": "64x64 w3 s3",
    "sixteen warps": "64x64 w16 s3",
    "no stage": "64x64 w4 s0",
    "six stages": "64x64 w4 s6",
    "a negative block": "-64x64 w4 s3",
    "a fraction": "64.0x64 w4 s3",
    "two spaces": "64x64  w4 s3",
    "one split": "64x64 w4 s3 /1",
    "a thousand splits": "64x64 w4 s3 /1000",
    "splits before warp specialisation": "64x64 w4 s3 /2 ws",
    "an unknown rider": "64x64 w4 s3 tma",
    "a line after it": "64x64 w4 s3\n",
    "text around it": "x64x64 w4 s3",
    "capitals": "64X64 W4 S3",
    "a leading zero": "064x64 w4 s3",
    "digits of another script": "٦٤x٦٤ w4 s3",
}


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED.keys())
def test_a_text_that_is_no_tile_is_refused_with_itself_in_the_message(text: str) -> None:
    with pytest.raises(ValueError, match="allowed: ") as refused:
        Tile.parse(text)
    assert repr(text) in str(refused.value)


def usage(*, registers: int = 128, spilled: int = 0, kib: float = 40, warps: int = 4) -> Usage:
    return Usage(registers, spilled, round(kib * 1024), warps, tensor_core=1, asynchronous=1)


@pytest.mark.parametrize("capability", LIMITS, ids=device.architecture)
def test_a_tile_is_legal_up_to_the_last_byte_of_a_block_and_illegal_beyond(capability: tuple[int, int]) -> None:
    most = LIMITS[capability].shared_per_block
    assert tiles.illegal(usage(kib=most / 1024), LIMITS[capability]) == ""
    refusal = tiles.illegal(usage(kib=(most + 1) / 1024), LIMITS[capability])
    assert str(most + 1) in refusal
    assert str(most) in refusal


def test_a_tile_that_spills_one_byte_is_illegal_and_the_reason_says_how_much() -> None:
    assert "spills 8 bytes" in tiles.illegal(usage(spilled=8), LIMITS[9, 0])


def test_registers_alone_make_no_tile_illegal() -> None:
    assert tiles.illegal(usage(registers=255, warps=8), LIMITS[8, 0]) == ""


OCCUPANCIES = [
    # capability, registers, KiB, warps, blocks, what decides
    ((8, 0), 168, 24.5, 4, 3, "registers"),
    ((9, 0), 128, 40, 4, 4, "registers"),
    ((8, 0), 255, 96, 8, 1, "registers"),
    ((8, 0), 40, 80, 4, 2, "shared memory"),
    ((8, 6), 40, 48, 4, 2, "shared memory"),
    ((9, 0), 64, 227, 4, 1, "shared memory"),
    ((8, 0), 16, 1, 8, 8, "threads"),
    ((8, 6), 16, 1, 8, 6, "threads"),
    ((8, 6), 16, 1, 1, 16, "blocks"),
    ((8, 9), 16, 1, 1, 24, "blocks"),
    ((9, 0), 16, 1, 1, 32, "blocks"),
]


@pytest.mark.parametrize(("capability", "registers", "kib", "warps", "blocks", "decided_by"), OCCUPANCIES)
def test_resident_blocks_are_those_of_the_occupancy_calculator(
    capability: tuple[int, int], registers: int, kib: float, warps: int, blocks: int, decided_by: str
) -> None:
    used = usage(registers=registers, kib=kib, warps=warps)
    assert tiles.blocks_per_multiprocessor(used, LIMITS[capability]) == blocks, decided_by


@given(st.sampled_from(sorted(LIMITS)), st.integers(16, 255), st.integers(0, 99 * 1024), st.sampled_from([4, 8, 12]))
def test_resident_blocks_fit_their_multiprocessor(capability: tuple[int, int], registers: int, shared: int, warps: int) -> None:
    limits, used = LIMITS[capability], Usage(registers, 0, shared, warps, 0, 0)
    blocks = tiles.blocks_per_multiprocessor(used, limits)
    assert blocks * warps * 32 * registers <= limits.registers
    assert blocks * (shared + 1024) <= limits.shared_per_multiprocessor
    assert blocks * warps * 32 <= limits.threads
    assert blocks <= limits.blocks


KEYS = st.builds(
    Key,
    st.sampled_from(tiles.OPERANDS),
    st.sampled_from(tiles.WIDTHS[:3]),
    st.booleans(),
    st.lists(st.integers(1, 2**30).map(tiles.bucket), min_size=1, max_size=2).map(tuple),
    st.booleans(),
)


@given(KEYS, KEYS)
def test_a_key_is_what_its_text_says(one: Key, other: Key) -> None:
    assert Key.parse(str(one)) == one
    assert (str(one) == str(other)) == (one == other)
    assert one.far_from(other) == other.far_from(one)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "16bit",
        "16bit d48",
        "16bit d64 causal",
        "16bit d64 100x128",
        "16bit d64 128x",
        "16bit d64 8x16",
        "16bit d64 128x128 ",
        "tf32 d256",
    ],
)
def test_a_text_that_is_no_key_is_refused_with_itself_in_the_message(text: str) -> None:
    with pytest.raises(ValueError, match="allowed: ") as refused:
        Key.parse(text)
    assert repr(text) in str(refused.value)


@given(st.integers(0, 2**30))
def test_a_bucket_holds_the_lengths_of_one_octave(length: int) -> None:
    assert tiles.bucket(length) & (tiles.bucket(length) - 1) == 0
    assert min(length, tiles.LARGEST_BUCKET) <= tiles.bucket(length) < max(2 * length, tiles.LEAST_BUCKET + 1)


# the hash that says whether a kernel has changed


def module(path: Path, text: str) -> ModuleType:
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    return importlib.util.module_from_spec(spec)


KERNEL = '''"""A kernel."""

def add(x, y=1):
    """The sum."""
    return x + y  # of both
'''
SAME = {
    "another comment": KERNEL.replace("# of both", "# an entirely different remark"),
    "no comment": KERNEL.replace("  # of both", ""),
    "another docstring": KERNEL.replace("The sum.", "What is left when both are counted."),
    "another module docstring": KERNEL.replace("A kernel.", "Two kernels."),
    "another layout": KERNEL.replace("x + y", "(\n        x\n        + y\n    )"),
}
CHANGED = {
    "another operator": KERNEL.replace("x + y", "x - y"),
    "another default": KERNEL.replace("y=1", "y=2"),
    "another name": KERNEL.replace("add", "plus"),
    "another order": KERNEL.replace("x + y", "y + x"),
    "a statement more": KERNEL + "    x = 1\n",
    "a text that is no docstring": KERNEL.replace("x + y", "'x'"),
}


def hash_of(folder: Path, text: str) -> str:
    return tiles.source_hash((module(folder / "kernel.py", text),))


@pytest.mark.parametrize("text", SAME.values(), ids=SAME.keys())
def test_comments_and_docstrings_leave_the_hash_alone(tmp_path: Path, text: str) -> None:
    assert text != KERNEL
    assert hash_of(tmp_path, text) == hash_of(tmp_path, KERNEL)


@pytest.mark.parametrize("text", CHANGED.values(), ids=CHANGED.keys())
def test_changed_code_changes_the_hash(tmp_path: Path, text: str) -> None:
    assert text != KERNEL
    assert hash_of(tmp_path, text) != hash_of(tmp_path, KERNEL)


def test_the_hash_covers_every_module_and_imports_none(tmp_path: Path) -> None:
    one, other = (module(tmp_path / f"{name}.py", f"raise SystemExit({name!r})\n") for name in ("one", "other"))
    assert len({tiles.source_hash(modules) for modules in ((one,), (other,), (one, other))}) == 3
    assert not {"one", "other"} & sys.modules.keys()


@pytest.mark.parametrize(
    ("name", "stem"), [("NVIDIA H200", "nvidia_h200"), ("NVIDIA A100-SXM4-80GB", "nvidia_a100_sxm4_80gb"), ("../x", "x")]
)
def test_a_devices_name_becomes_a_file_name_that_stays_in_its_folder(name: str, stem: str) -> None:
    assert tiles.slug(name) == stem


def test_a_kernel_with_atomics_is_not_deterministic_and_so_not_legal() -> None:
    used = Usage(32, 0, 1024, 4, tensor_core=1, asynchronous=1, atomics=2)
    assert "2 atomic operations" in tiles.illegal(used, LIMITS[8, 0])
