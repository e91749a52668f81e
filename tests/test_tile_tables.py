"""Tile tables: which tile a call gets, and what no table may hold."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.test_tiles import LEGAL, module
from triton_attn import device, tiles
from triton_attn.device import Profile
from triton_attn.tiles import Key, Space, TableError, Tile

H200 = Profile("NVIDIA H200", (9, 0))
A40 = Profile("NVIDIA A40", (8, 6))
LAUNCH, KEY = "attention/pointers/forward", Key("16bit", 64)
FIRST = Tile(16, 16, 4, 1)


CANDIDATES = (Tile(64, 64, 4, 2), Tile(64, 128, 4, 2), Tile(128, 64, 8, 3), Tile(128, 128, 8, 3))


@pytest.fixture
def space(tmp_path: Path) -> Space:
    return Space({(8, 0): lambda key: CANDIDATES}, lambda key: FIRST, (module(tmp_path / "kernel.py", "x = 1\n"),))


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Path]]:
    """The user's tables and ours, both empty."""
    found = {origin: tmp_path / origin for origin in ("user", "shipped")}
    monkeypatch.setattr(device, "USER_TABLE", str(found["user"]))
    monkeypatch.setattr(tiles, "SHIPPED", found["shipped"])
    tiles.forget()
    yield found
    tiles.forget()


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


GPU = {"multiprocessors": 132, "memory": 0, "refusal": ""}


def tuned_on(name: str, capability: tuple[int, int] = (9, 0), multiprocessors: int = 132) -> dict[str, Any]:
    """What the tuner writes of the machine: the device of the table, after another."""
    others = {"name": "NVIDIA T4", "capability": (7, 5), **GPU}
    return {"gpus": [others, {**GPU, "name": name, "capability": capability, "multiprocessors": multiprocessors}]}


def test_a_device_that_nobody_has_tuned_takes_the_table_of_the_nearest_of_its_capability(folders: dict[str, Path], space: Space) -> None:
    asked = Profile("NVIDIA H100 80GB HBM3", (9, 0), multiprocessors=132)
    for place, (name, multiprocessors) in enumerate([("NVIDIA H100 NVL", 114), ("NVIDIA H200", 132), ("NVIDIA H20", 78)]):
        entry = table(space, CANDIDATES[place])
        tiles.write(folders["user"] / f"{tiles.slug(name)}.json", entry, tuned_on(name, multiprocessors=multiprocessors))
    tiles.write(folders["user"] / "nvidia_a100.json", table(space, CANDIDATES[3]), tuned_on("NVIDIA A100", (8, 0)))
    tiles.write(folders["user"] / "sm_90.json", table(space, CANDIDATES[3]), {})
    tiles.write(folders["shipped"] / f"{tiles.slug(asked.name)}.json", table(space, CANDIDATES[3]), tuned_on(asked.name))
    found = tiles.look_up(LAUNCH, space, KEY, asked)
    assert (found.tile, found.source) == (CANDIDATES[1], "user table nvidia_h200.json (offline)")
    (folders["user"] / "nvidia_h200.json").write_text("{")
    (folders["user"] / "nvidia_h200-correctness.json").write_text("{}")
    tiles.forget()
    assert tiles.look_up(LAUNCH, space, KEY, asked).tile == CANDIDATES[0]
    tiles.write(folders["user"] / f"{tiles.slug(asked.name)}.json", table(space, CANDIDATES[2]), tuned_on(asked.name))
    assert tiles.look_up(LAUNCH, space, KEY, asked).tile == CANDIDATES[2]


def test_a_file_instead_of_a_folder_serves_whatever_device_is_here(
    folders: dict[str, Path], space: Space, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiles.write(folders["user"] / "nvidia_h200.json", table(space, CANDIDATES[0]), {})
    tiles.write(tmp_path / "mine.json", table(space, CANDIDATES[1]), {})
    monkeypatch.setattr(device, "USER_TABLE", str(tmp_path / "mine.json"))
    for profile in (H200, A40):
        assert tiles.look_up(LAUNCH, space, KEY, profile).source == "user table mine.json (offline)"
    tiles.write(tmp_path / "mine.json", table(space, Tile(256, 256, 1, 5)), {})
    with pytest.warns(UserWarning, match="none of the kernel's tiles"):
        assert tiles.look_up(LAUNCH, space, KEY, H200).tile == FIRST


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
    assert list(space.of((8, 6), KEY)) == list(space.of((8, 0), KEY)) == list(CANDIDATES)
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
    "a tile of too many warps": entry_of(tiles={"16bit d64": "64x64 w9 s2"}),
    "a tile of no stage": entry_of(tiles={"16bit d64": "64x64 w4 s0"}),
    "a tile in other digits": entry_of(tiles={"16bit d64": "64x64 w4 s\u0662"}),
    "a key that is none": entry_of(tiles={"16bit d63": "64x64 w4 s2"}),
    "a length that is no power of two": entry_of(tiles={"16bit d64 100x100": "64x64 w4 s2"}),
    "a time without end": entry_of(milliseconds={"16bit d64": 1.0}).replace("1.0", "1e999"),
    "a time in words": entry_of(milliseconds={"16bit d64": "nan"}),
    "a time before the start": entry_of(milliseconds={"16bit d64": -1.0}),
    "a list of what it was made with": text_of(made=[]),
    "a device in words": text_of(made={"gpus": ["NVIDIA H200"]}),
    "a device of no capability": text_of(made={"gpus": [{"name": "sm_90", "capability": None, "multiprocessors": 1}]}),
}


@pytest.mark.parametrize("damaged", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_table_is_refused_by_its_name_and_a_call_goes_on_to_the_next(
    folders: dict[str, Path], space: Space, damaged: str
) -> None:
    path = folders["user"] / "sm_90.json"
    path.parent.mkdir()
    path.write_text(damaged)
    with pytest.raises(TableError) as refused:
        tiles.read(path)
    assert str(path) in str(refused.value)
    tiles.write(folders["shipped"] / "sm_90.json", table(space, Tile(64, 64, 4, 2)), {})
    with pytest.warns(UserWarning, match="tile table left out: .*sm_90"):
        assert tiles.look_up(LAUNCH, space, KEY, H200).source.startswith("shipped table")
    # said once
    assert tiles.look_up(LAUNCH, space, KEY, H200).tile == Tile(64, 64, 4, 2)


def test_a_tile_that_the_kernel_does_not_have_is_left_out_with_a_warning(folders: dict[str, Path], space: Space) -> None:
    tiles.write(folders["user"] / "sm_90.json", table(space, Tile(256, 256, 1, 5)), {})
    with pytest.warns(UserWarning, match="256x256 w1 s5 is none of the kernel's tiles"):
        assert tiles.look_up(LAUNCH, space, KEY, H200).tile == FIRST


LONGER = Key("16bit", 64, lengths=(4096, 4096))


@pytest.mark.parametrize(
    ("lengths", "causal", "tile"),
    [
        ((4096, 4096), False, CANDIDATES[1]),  # its own
        ((8192, 2048), False, CANDIDATES[1]),  # the nearest
        ((512, 512), False, CANDIDATES[2]),
        ((65536, 4096), False, CANDIDATES[0]),  # too far from any: the one for any length
        ((4096, 4096), True, CANDIDATES[3]),
        ((256, 256), True, CANDIDATES[0]),
    ],
)
def test_a_call_takes_the_tile_tuned_for_the_nearest_lengths(
    folders: dict[str, Path], space: Space, lengths: tuple[int, ...], causal: bool, tile: Tile
) -> None:
    entry = table(space, CANDIDATES[0])
    entry[LAUNCH]["tiles"] |= {
        "16bit d64 4096x4096": CANDIDATES[1],
        "16bit d64 512x512": CANDIDATES[2],
        "16bit d64 4096x4096 causal": CANDIDATES[3],
        "16bit d64 4096x4096 causal masked": CANDIDATES[0],
    }
    tiles.write(folders["user"] / "sm_90.json", entry, {})
    found = tiles.look_up(LAUNCH, space, Key("16bit", 64, lengths=lengths, causal=causal), H200)
    assert found.tile == tile
    assert ("for 16bit d64" in found.source) == (lengths == (8192, 2048))


def test_a_call_reads_no_kernel_source_a_second_time(folders: dict[str, Path], space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles.write(folders["user"] / "sm_90.json", table(space, CANDIDATES[0]), {})
    tiles.look_up(LAUNCH, space, KEY, H200)
    monkeypatch.setattr(tiles, "source_hash", lambda modules: pytest.fail("hashed again"))
    assert tiles.look_up(LAUNCH, space, KEY, H200).tile == CANDIDATES[0]


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
