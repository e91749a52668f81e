"""The shipped tables fit the kernels as they are: complete, fresh, and of tiles that the kernels themselves name."""

from __future__ import annotations

from pathlib import Path

import pytest

from triton_attn import CATALOG, device, tiles
from triton_attn.mechanism import Kernel, Launch, Mechanism
from triton_attn.offline import DTYPES
from triton_attn.testing import inputs

LAUNCHES = [
    pytest.param(target, row, kernel, launch, id=f"{target}-{row.name}-{kernel.name}-{launch.name}")
    for target in map(device.architecture, device.LIMITS)
    for row in CATALOG.values()
    for kernel in row.kernels
    if device.capability(target) in kernel.capabilities
    for launch in kernel.launches
]


@pytest.mark.parametrize(("target", "row", "kernel", "launch"), LAUNCHES)
def test_every_call_that_a_kernel_serves_finds_a_fresh_tile(target: str, row: Mechanism, kernel: Kernel, launch: Launch) -> None:
    capability = device.capability(target)
    space = kernel.load().spaces[launch.name]
    for key in space.entries():
        if all(kernel.refuses(*inputs.meta(row, case, DTYPES[key.operands])) for case in row.probes(key.width, key.plain)):
            continue
        found = tiles.look_up(f"{row.name}/{kernel.name}/{launch.name}", space, key, device.Profile(target, capability))
        assert target in found.source, f"{key}: `make tables` chooses one"
        assert not found.stale, f"{key}: the kernel has changed since; `make tables` chooses again"
        assert found.tile in space.of(capability, key)


@pytest.mark.parametrize("path", sorted(tiles.SHIPPED.glob("*.json")), ids=lambda path: path.name)
def test_every_shipped_table_can_be_read_and_says_where_it_is_from(path: Path) -> None:
    for entry in tiles.read(path).values():
        assert entry["evidence"].startswith(("offline", "tuned on"))
