"""What this machine is: GPU, limits, compiler, interpreter. The only reader of the environment and of device properties."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor offers (CUDA programming guide, table of compute capabilities)."""

    shared_per_block: int
    shared_per_multiprocessor: int
    registers: int = 65536
    threads: int = 2048
    blocks: int = 32


_KIB = 1024
LIMITS: dict[tuple[int, int], Limits] = {
    (8, 0): Limits(163 * _KIB, 164 * _KIB),
    (8, 6): Limits(99 * _KIB, 100 * _KIB, threads=1536, blocks=16),
    (8, 9): Limits(99 * _KIB, 100 * _KIB, threads=1536, blocks=24),
    (9, 0): Limits(227 * _KIB, 228 * _KIB),
}


@dataclass(frozen=True)
class Peaks:
    """What a whole GPU can do at most, per second. A multiply-add is two FLOPs; products are dense ones."""

    multiprocessors: int
    tensor: float  # FLOPs of 16-bit products
    tf32: float
    fp32: float  # without tensor cores
    bandwidth: float  # bytes from memory
    cache: float  # bytes from the second-level cache
    shared: float  # bytes from shared memory
    exponentials: float


# Data sheets of A100 80 GB SXM and H100 SXM; per clock and multiprocessor 16 exponentials and 128 bytes of shared memory (CUDA programming
# guide). The cache: 5120 bytes per clock by the whitepaper of A100; nobody has published H100's, so the same per clock is a guess.
PEAKS: dict[tuple[int, int], Peaks] = {
    (8, 0): Peaks(108, 312e12, 156e12, 19.5e12, 2.04e12, 7.2e12, 19.5e12, 2.44e12),
    (9, 0): Peaks(132, 989e12, 495e12, 67e12, 3.35e12, 9.0e12, 33.5e12, 4.18e12),
}


@dataclass(frozen=True)
class Profile:
    """A device as the dispatcher sees it. `refusal` says why no kernel runs there; empty where some may."""

    name: str
    capability: tuple[int, int]
    refusal: str = ""
    multiprocessors: int = 0
    memory: int = 0


def environment(name: str, default: str = "") -> str:
    """Read one variable."""
    return os.environ.get(name, default)


DEFAULT_BACKEND = environment("TRITON_ATTN_BACKEND", "auto")
USER_TABLE = environment("TRITON_ATTN_TILES")


@functools.cache
def triton_version() -> str:
    """The installed triton, or an empty string."""
    if importlib.util.find_spec("triton") is None:
        return ""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # a build under another name
        import triton

        return str(triton.__version__)


# Triton's own does not; `triton_attn.testing.strict_interpreter` sets this while it is on
interpreter_computes_bfloat16 = False


def interpreting() -> bool:
    """Whether triton kernels run in its interpreter: triton decides when a kernel is defined."""
    return environment("TRITON_INTERPRET") == "1" and bool(triton_version())


def interpret() -> None:
    """Turn the interpreter on, for kernels not yet imported and for child processes."""
    os.environ["TRITON_INTERPRET"] = "1"


def _compiler_refusal() -> str:
    version = triton_version()
    if not version:
        return "triton is not installed"
    if version == "3.8.0":
        return "triton 3.8.0 zeroes parts of gradients on Hopper; use another version"
    return ""


@functools.cache
def profile(index: int) -> Profile:
    """The CUDA device with this index."""
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    return Profile(
        properties.name,
        capability,
        refusal(capability, hip=torch.version.hip is not None),
        properties.multi_processor_count,
        properties.total_memory,
    )


def refusal(capability: tuple[int, int], *, hip: bool = False) -> str:
    """Why no kernel runs on a GPU of this capability; empty where some may."""
    if hip:
        return "ROCm is not measured yet"
    if capability < (8, 0):
        return f"needs compute capability 8.0 or higher, this GPU has {_dotted(capability)}"
    if capability not in LIMITS:
        return f"compute capability {_dotted(capability)} is not measured yet"
    return _compiler_refusal()


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def architecture(capability: tuple[int, int]) -> str:
    """(8, 0) -> "sm_80", the way tables and targets are named."""
    return "sm_{}{}".format(*capability)


def capability(architecture: str) -> tuple[int, int]:
    """ "sm_90" -> (9, 0); ValueError names what is allowed."""
    found = re.fullmatch(r"sm_(\d+)(\d)", architecture)
    if found is None or (int(found[1]), int(found[2])) not in LIMITS:
        raise ValueError(f"target is {architecture!r}; allowed: {', '.join(f'sm_{major}{minor}' for major, minor in LIMITS)}")
    return int(found[1]), int(found[2])


@contextlib.contextmanager
def guard(tensor: torch.Tensor) -> Iterator[None]:
    """Make the tensor's device current while a kernel launches: Triton launches on the current one."""
    if tensor.is_cuda:
        with torch.cuda.device(tensor.device):
            yield
    else:
        yield


def user_tables() -> Path | None:
    """Where the user's own tuned tables lie: TRITON_ATTN_TILES, a folder or one table; else the user's data folder, with platformdirs."""
    if USER_TABLE:
        return Path(USER_TABLE)
    try:
        import platformdirs
    except ModuleNotFoundError:
        return None
    return platformdirs.user_data_path("triton_attn", appauthor=False) / "tables"


def cache_size(where: torch.device) -> int:
    """Bytes of a GPU's second-level cache; 0 of anything else."""
    return torch.cuda.get_device_properties(where).L2_cache_size if where.type == "cuda" else 0


@functools.cache
def ptxas_version() -> str:
    """The assembler that triton brings, which decides how right the machine code is (12.8 miscompiled on Hopper)."""
    if not triton_version():
        return ""
    from triton import knobs

    said = subprocess.run([knobs.nvidia.ptxas.path, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", said)
    return found[1] if found else ""


def describe() -> dict[str, Any]:
    """The machine in one dictionary, for reports and result files."""
    gpus = [asdict(profile(index)) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return {
        "torch": torch.__version__,
        "triton": triton_version() or None,
        "ptxas": ptxas_version() or None,
        "cuda": torch.version.cuda,
        "driver": _driver() if gpus else None,
        "interpreter": interpreting(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def _driver() -> str | None:
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False).stdout
        return said.splitlines()[0].strip() if said else None
    return None
