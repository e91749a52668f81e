"""Tiles: how they are written, which are legal, how many fit a multiprocessor, which one a call gets, and what no table may hold."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from triton_attn import device, tiles
from triton_attn.device import LIMITS, Profile
from triton_attn.tiles import Key, Space, TableError, Tile, Usage

H200 = Profile("NVIDIA H200", (9, 0))
A40 = Profile("NVIDIA A40", (8, 6))
LAUNCH, KEY = "attention/pointers/forward", Key("16bit", 64)
FIRST = Tile(16, 16, 4, 1)

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


# what a call gets


def module(path: Path, text: str) -> ModuleType:
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    return importlib.util.module_from_spec(spec)


def forget() -> None:
    tiles.read.cache_clear()
    tiles._look_up.cache_clear()


@pytest.fixture
def space(tmp_path: Path) -> Space:
    return Space({(8, 0): lambda key: (Tile(64, 64, 4, 2),)}, lambda key: FIRST, (module(tmp_path / "kernel.py", "x = 1\n"),))


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Path]]:
    """The user's tables and ours, both empty."""
    found = {origin: tmp_path / origin for origin in ("user", "shipped")}
    monkeypatch.setattr(device, "USER_TABLE", str(found["user"]))
    monkeypatch.setattr(tiles, "SHIPPED", found["shipped"])
    forget()
    yield found
    forget()


def table(space: Space, tile: Tile, *, key: Key = KEY, launch: str = LAUNCH) -> dict[str, Any]:
    return {launch: {"hash": tiles.source_hash(space.modules), "evidence": "offline", "tiles": {str(key): tile}}}


# best first: a call takes the first of these that there is
PLACES = [
    ("user", "nvidia_h200", Tile(128, 128, 8, 3)),
    ("user", "sm_90", Tile(128, 64, 8, 3)),
    ("shipped", "nvidia_h200", Tile(64, 128, 4, 2)),
    ("shipped", "sm_90", Tile(64, 64, 4, 2)),
]


@pytest.mark.parametrize("absent", range(len(PLACES) + 1))
def test_a_call_takes_user_before_shipped_device_before_capability_and_else_the_first(
    folders: dict[str, Path], space: Space, absent: int
) -> None:
    for origin, stem, tile in PLACES[absent:]:
        tiles.write(folders[origin] / f"{stem}.json", table(space, tile), {})
    found = tiles.look_up(LAUNCH, space, KEY, H200)
    if absent == len(PLACES):
        assert (found.tile, found.source) == (FIRST, "first of its tile space")
    else:
        origin, stem, tile = PLACES[absent]
        assert (found.tile, found.source) == (tile, f"{origin} table {stem}.json (offline)")
    assert not found.stale


def test_a_table_that_lacks_the_launch_or_the_key_gives_way_to_the_next(folders: dict[str, Path], space: Space) -> None:
    tiles.write(folders["user"] / "nvidia_h200.json", table(space, Tile(128, 128, 8, 3), launch="attention/pointers/backward_key"), {})
    tiles.write(folders["user"] / "sm_90.json", table(space, Tile(128, 64, 8, 3), key=Key("16bit", 64, plain=False)), {})
    tiles.write(folders["shipped"] / "sm_90.json", table(space, Tile(64, 64, 4, 2)), {})
    assert tiles.look_up(LAUNCH, space, KEY, H200).tile == Tile(64, 64, 4, 2)


def test_tiles_of_one_capability_are_never_given_to_another(folders: dict[str, Path], space: Space) -> None:
    for stem in ("sm_80", "sm_90", "nvidia_h200"):
        tiles.write(folders["user"] / f"{stem}.json", table(space, Tile(128, 128, 8, 3)), {})
    assert tiles.look_up(LAUNCH, space, KEY, A40).tile == FIRST


def test_without_a_user_folder_only_our_own_tables_are_read(
    folders: dict[str, Path], space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles.write(folders["user"] / "sm_90.json", table(space, Tile(128, 128, 8, 3)), {})
    monkeypatch.setattr(device, "USER_TABLE", "")
    assert tiles.look_up(LAUNCH, space, KEY, H200).tile == FIRST


@pytest.mark.parametrize("whole_call", [True, False], ids=["one tile", "a tile per launch"])
def test_an_explicit_tile_wins_over_every_table(
    folders: dict[str, Path], space: Space, whole_call: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from triton_attn.kernels import _softmax, attention

    for origin, stem, tile in PLACES:
        tiles.write(folders[origin] / f"{stem}.json", table(space, tile), {})
    launched: list[dict[str, Any]] = []

    class Recorder:
        def __getitem__(self, grid: object) -> Recorder:
            return self

        def __call__(self, *args: Any, **constants: Any) -> None:
            launched.append(constants)

    monkeypatch.setattr(_softmax, "forward_kernel", Recorder())
    asked = Tile(256, 32, 8, 5)
    x = torch.ones(1, 1, 4, 16)
    attention.attention(x, x, x, tile=asked if whole_call else {"forward": asked})
    (constants,) = launched
    assert [constants[name] for name in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")] == [256, 32, 8, 5]


def test_a_tile_found_for_a_kernel_that_has_changed_since_is_used_and_called_stale(folders: dict[str, Path], space: Space) -> None:
    tiles.write(folders["shipped"] / "sm_90.json", table(space, Tile(64, 64, 4, 2)), {})
    (kernel,) = space.modules
    assert kernel.__file__ is not None
    Path(kernel.__file__).write_text("x = 2\n")
    found = tiles.look_up(LAUNCH, space, KEY, H200)
    assert (found.tile, found.stale) == (Tile(64, 64, 4, 2), True)


def test_a_capability_takes_the_candidates_of_the_nearest_older_one_and_else_the_first(space: Space) -> None:
    assert list(space.of((8, 6), KEY)) == list(space.of((8, 0), KEY)) == [Tile(64, 64, 4, 2)]
    assert list(space.of((7, 5), KEY)) == [FIRST]


# tables


def text_of(**changes: Any) -> str:
    entry = {"hash": "0", "evidence": "offline", "tiles": {"16bit d64": "64x64 w4 s2"}}
    return json.dumps({"schema": 1, "made": {}, "launches": {LAUNCH: entry}} | changes)


def entry_of(**changes: Any) -> str:
    entry = {"hash": "0", "evidence": "offline", "tiles": {"16bit d64": "64x64 w4 s2"}} | changes
    return text_of(launches={LAUNCH: {name: value for name, value in entry.items() if value is not None}})


DAMAGED = {
    "nothing": "",
    "no JSON": "tiles: none",
    "half of a table": text_of()[:-20],
    "two tables": text_of() * 2,
    "a list": "[]",
    "larger than a megabyte": text_of(made={"by": "x" * 2**20}),
    "brackets without end": "[" * 100_000,
    "not a number": text_of(made={"seconds": math.nan}),
    "infinity": text_of(made={"seconds": -math.inf}),
    "a number of ten thousand digits": text_of().replace('"made": {}', f'"made": {"9" * 10_000}'),
    "a key twice": text_of().replace('"made": {}', '"made": {"a": 1, "a": 2}'),
    "a launch twice": text_of().replace('"launches": {', f'"launches": {{"{LAUNCH}": {{}}, '),
    "another schema": text_of(schema=2),
    "a schema in words": text_of(schema="1"),
    "no schema": text_of().replace('"schema"', '"scheme"'),
    "no launches": text_of().replace('"launches"', '"lunches"'),
    "a list of launches": text_of(launches=[]),
    "an entry that is a list": text_of(launches={LAUNCH: []}),
    "an entry that is a text": text_of(launches={LAUNCH: "64x64 w4 s2"}),
    "no hash": entry_of(hash=None),
    "no evidence": entry_of(evidence=None),
    "no tiles": entry_of(tiles=None),
    "a list of tiles": entry_of(tiles=["64x64 w4 s2"]),
    "a tile that is a number": entry_of(tiles={"16bit d64": 64}),
    "a tile that is none": entry_of(tiles={"16bit d64": "64x48 w4 s2"}),
}


@pytest.mark.parametrize("damaged", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_table_is_refused_by_its_name(folders: dict[str, Path], space: Space, damaged: str) -> None:
    path = folders["user"] / "sm_90.json"
    path.parent.mkdir()
    path.write_text(damaged)
    with pytest.raises(TableError) as refused:
        tiles.look_up(LAUNCH, space, KEY, H200)
    assert str(path) in str(refused.value)


def test_the_damaged_tables_differ_from_a_right_one_by_their_damage_alone(tmp_path: Path) -> None:
    (tmp_path / "sm_90.json").write_text(text_of())
    (tmp_path / "sm_80.json").write_text(entry_of())
    right = {LAUNCH: {"hash": "0", "evidence": "offline", "tiles": {"16bit d64": Tile(64, 64, 4, 2)}}}
    assert tiles.read(tmp_path / "sm_90.json") == tiles.read(tmp_path / "sm_80.json") == right


def test_bytes_that_are_no_text_are_refused_by_the_files_name(tmp_path: Path) -> None:
    path = tmp_path / "sm_90.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TableError, match=r"sm_90\.json"):
        tiles.read(path)


def test_an_entry_with_a_bad_tile_is_named_with_its_launch(tmp_path: Path) -> None:
    path = tmp_path / "sm_90.json"
    path.write_text(DAMAGED["a tile that is none"])
    with pytest.raises(TableError, match=f"{LAUNCH}.*64x48 w4 s2"):
        tiles.read(path)


@given(st.dictionaries(st.sampled_from([str(key) for key in tiles.every_key()]), LEGAL))
def test_what_is_written_is_read_again(tmp_path_factory: pytest.TempPathFactory, chosen: dict[str, Tile]) -> None:
    path = tmp_path_factory.mktemp("tables") / "deeper" / "sm_90.json"
    launches = {LAUNCH: {"hash": "abc", "evidence": "median of 30", "tiles": chosen}}
    tiles.write(path, launches, {"triton": "3.9.0"})
    assert tiles.read(path) == launches
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_table_written_again_is_the_one_that_later_calls_see(folders: dict[str, Path], space: Space) -> None:
    for tile in (Tile(128, 128, 8, 3), Tile(64, 64, 4, 2)):
        tiles.write(folders["user"] / "sm_90.json", table(space, tile), {})
        assert tiles.look_up(LAUNCH, space, KEY, H200).tile == tile


def test_a_write_that_fails_at_any_step_leaves_the_old_table_whole(tmp_path: Path, space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tables" / "sm_90.json"
    tiles.write(path, table(space, Tile(64, 64, 4, 2)), {})
    before = path.read_bytes()

    def half(self: Path, text: str) -> int:
        self.write_bytes(text.encode()[: len(text) // 2])
        raise OSError("disk full")

    def killed(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    for step, failing in (("write_text", half), ("replace", killed)):
        with monkeypatch.context() as patch:
            patch.setattr(Path, step, failing)
            with pytest.raises((OSError, KeyboardInterrupt)):
                tiles.write(path, table(space, Tile(128, 128, 8, 3)), {})
        assert path.read_bytes() == before


UNREADABLE: dict[str, tuple[Tile, dict[str, Any]]] = {
    "not a number": (Tile(64, 64, 4, 2), {"seconds": math.nan}),
    "a tile that is none": (Tile(48, 64, 4, 2), {}),
}


@pytest.mark.parametrize(("tile", "made"), UNREADABLE.values(), ids=UNREADABLE.keys())
def test_a_table_that_would_be_refused_when_read_is_not_written(tmp_path: Path, space: Space, tile: Tile, made: dict[str, Any]) -> None:
    path = tmp_path / "sm_90.json"
    with pytest.raises(ValueError, match=r"nan|NaN|allowed: "):
        tiles.write(path, table(space, tile), made)
    assert not path.exists()


# the hash that says whether a kernel has changed

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
