"""Compile any kernel for a GPU that is not here, through its ordinary launcher, and read what it would use.

Triton compiles without a GPU; only its launcher asks a driver which GPU it is. A stub answers, and tensors on the meta device
stand for the arguments. The interpreter must be off: it accepts what the compiler rejects, and the other way round.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from triton_attn import device
from triton_attn.tiles import Usage


class CompileError(RuntimeError):
    """A kernel that the compiler rejects; the message is the compiler's."""


class _Driver:
    """What Triton's launcher asks of a driver before it compiles."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.code = capability[0] * 10 + capability[1]

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.code, 32)

    def get_current_device(self) -> int:
        # never a real device's number, so that no compiled kernel is taken for one
        return -self.code

    def get_current_stream(self, device: int) -> int:
        return 0

    def is_active(self) -> bool:
        return True


@contextlib.contextmanager
def compiling_for(capability: tuple[int, int]) -> Iterator[list[Any]]:
    """Inside, a launch compiles for `capability` and does not run; yields the list of kernels compiled so far."""
    if device.interpreting():
        raise CompileError("TRITON_INTERPRET=1 is set: interpreter and compiler cannot share a process")
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    compiled: list[Any] = []
    launch = JITFunction.run

    def warm(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled.append(launch(self, *args, grid=grid, warmup=True, **options))
        return compiled[-1]

    active = driver._active  # `driver.active` would look for a GPU
    driver.set_active(_Driver(capability))
    JITFunction.run = warm
    try:
        yield compiled
    finally:
        JITFunction.run = launch
        driver.set_active(active)


def usage(kernel: Any) -> Usage:
    """Registers, spills, shared memory and instructions of one compiled kernel."""
    assembly = kernel.asm["ptx"]
    registers, stack = _resources(kernel.asm["cubin"])
    launched = re.search(r"\.(?:req|max)ntid\s+(\d+)", assembly)
    return Usage(
        registers=registers,
        spilled=stack,
        shared=kernel.metadata.shared,
        warps=int(launched[1]) // 32 if launched else kernel.metadata.num_warps,
        tensor_core=assembly.count("wgmma.mma_async") + len(re.findall(r"\bmma\.sync", assembly)),
        asynchronous=assembly.count("cp.async.c") + assembly.count("cp.async.bulk.tensor"),
        specialised="setmaxnreg" in assembly,
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    if found is None:
        raise CompileError(f"cuobjdump said {said!r}")
    return int(found[1]), int(found[2])
