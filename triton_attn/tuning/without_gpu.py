"""Tiles for a GPU that is not here: by what the compiler says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from triton_attn import device, offline, tiles
from triton_attn.mechanism import Mechanism


def choose_tiles(
    rows: Sequence[Mechanism],
    target: str,
    *,
    start: Mapping[str, Any] | None = None,
    jobs: int = 1,
    tick: Callable[[str], None] = lambda text: None,
) -> dict[str, dict[str, Any]]:
    """A table for a target without a GPU: per launch and key the first candidate that compiles, fits and does not spill.

    Candidates before those of the table `start` are passed over: that table was chosen with another compiler, and a shipped tile
    has to be legal with both. Launches that this compiler has passed already, with the same sources, stay as they are.
    """
    tasks, table = [], dict[str, dict[str, Any]]()
    for row in rows:
        for kernel, launch, space in offline.launches_of(row, device.capability(target)):
            full, known = f"{row.name}/{kernel.name}/{launch.name}", tiles.source_hash(space.modules)
            old = (start or {}).get(full, {"hash": "", "tiles": {}, "compilers": []})
            same = old["hash"] == known
            passed = old.get("compilers", []) if same else []
            if same and device.triton_version() in passed:
                table[full] = old
                continue
            table[full] = {
                "hash": known,
                "evidence": "offline",
                "tiles": {},
                "compilers": [*passed, device.triton_version()],
                "before": old,
            }
            for key in space.entries():
                candidates = tuple(space.of(device.capability(target), key))
                begun = old["tiles"].get(str(key))
                candidates = candidates[candidates.index(begun) if begun in candidates else 0 :]
                tasks.append((row.name, kernel.name, launch.name, key, candidates, target))
    for task, result in offline.shared_out(offline.first_legal, tasks, jobs):
        full = "/".join(task[:3])
        tick(f"{full} {target} {task[3]}: {'refused' if result is None else result.fault or result.tile}")
        if result is not None and not result.fault:
            table[full]["tiles"][result.key] = tiles.Tile.parse(result.tile)
    for entry in table.values():
        old = entry.pop("before", entry)
        if entry["tiles"] != old["tiles"]:  # what another compiler passed was another choice
            entry["compilers"] = [device.triton_version()]
    return {full: entry for full, entry in table.items() if entry["tiles"]}


def recheck(
    rows: Sequence[Mechanism], target: str, table: Mapping[str, Any], *, every: int, jobs: int = 1, tick: Callable[[str], None]
) -> list[str]:
    """Compile every so many entries of a table again: for each why it does not hold any more, or an empty string."""
    tasks, found = [], []
    for row in rows:
        for kernel, launch, space in offline.launches_of(row, device.capability(target)):
            entry = table.get(f"{row.name}/{kernel.name}/{launch.name}", {"hash": "", "tiles": {}})
            for key in list(space.entries())[::every]:
                if entry["hash"] != tiles.source_hash(space.modules):
                    found.append(f"{row.name}/{kernel.name}/{launch.name}: chosen for other sources")
                    break
                if str(key) in entry["tiles"]:
                    tasks.append((row.name, kernel.name, launch.name, key, (entry["tiles"][str(key)],), target))
    for task, result in offline.shared_out(offline.first_legal, tasks, jobs):
        tick(f"{'/'.join(task[:3])} {target} {task[3]}")
        fault = "the kernel refuses such calls" if result is None else result.fault
        found.append(f"{'/'.join(task[:3])} {task[3]}: {fault}" if fault else "")
    return found
