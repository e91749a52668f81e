"""Which implementation serves a call on this device, and why: kernel, portable, or the reference when asked for."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

import torch

from triton_attn import device
from triton_attn.arguments import ArgumentError
from triton_attn.mechanism import Kernel, Mechanism, Options, Tensors

_Function = TypeVar("_Function", bound=Callable[..., Any])
BACKENDS = ("auto", "triton", "portable", "reference")


class Unsupported(NotImplementedError):
    """A kernel was insisted on and none can serve the call; the message has every kernel's reason."""


@dataclass(frozen=True)
class Explanation:
    """What a call would run and why. `str` of it is a paragraph for people."""

    mechanism: str
    path: str  # "kernel", "portable" or "reference"
    kernel: str = ""
    reasons: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # kernel or "call" -> why it does not run
    tiles: Mapping[str, str] = field(default_factory=dict)  # launch -> tile and where it comes from

    def __str__(self) -> str:
        lines = [f"{self.mechanism} runs " + (f"kernel {self.kernel}" if self.kernel else f"its {self.path} path")]
        lines += [f"  {launch}: {tile}" for launch, tile in self.tiles.items()]
        lines += [f"  not {who}: {why}" for who, all_of in self.reasons.items() for why in all_of]
        return "\n".join(lines)


class _Explained(BaseException):
    """Carries an explanation out of a call that would have run."""

    def __init__(self, explanation: Explanation) -> None:
        super().__init__()
        self.explanation = explanation


class _Local(threading.local):
    """Thread-local and no ContextVar: torch.compile traces the one and refuses the other. A missing name would cost half a microsecond."""

    backend: str | None = None
    explaining = False
    simulating = False


_local = _Local()
_warned: set[str] = set()


def _known(backend: str, function: str, argument: str) -> str:
    if backend not in BACKENDS:
        raise ArgumentError(function, argument, f"is {backend!r}; allowed: {', '.join(BACKENDS)}")
    return backend


class use_backend:
    """Choose the implementation for this thread, as a context manager.

    "triton" runs a kernel or raises Unsupported; "portable" runs stock PyTorch operators; "reference" the naive definition;
    "auto", the default, a kernel where one can serve the call and else portable. TRITON_ATTN_BACKEND sets the default.
    """

    def __init__(self, backend: str) -> None:
        self.backend = _known(backend, "use_backend", "backend")
        self.before: list[str | None] = []  # one for each time it is entered

    def __enter__(self) -> None:
        self.before.append(_local.backend)
        _local.backend = self.backend

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _local.backend = self.before.pop()


class simulate_kernels:
    """Calls of this thread take kernels as on a GPU of the newest capability, for tensors that have shapes and no numbers."""

    def __enter__(self) -> None:
        self.before, _local.simulating = _local.simulating, True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _local.simulating = self.before


def backend() -> str:
    """The backend asked for in this thread."""
    return _local.backend or _known(device.DEFAULT_BACKEND, "environment", "TRITON_ATTN_BACKEND")


def choose(row: Mechanism, tensors: Tensors, options: Options | None = None) -> str:
    """ "kernel", "portable" or "reference"; Unsupported if a kernel was insisted on and none may run."""
    asked = backend()
    if asked in ("portable", "reference"):
        return asked
    first = next(iter(tensors.values()))
    if asked == "auto" and first.device.type == "cpu" and not _local.simulating:
        return "portable"
    reasons = refusals(row, tensors, options)
    if not reasons:
        return "kernel"
    if asked == "triton":
        raise Unsupported(f"{row.name}: no kernel can serve this call: {'; '.join(reasons)}")
    return "portable"


def refusals(row: Mechanism, tensors: Tensors, options: Options | None = None) -> list[str]:
    """Why no kernel at all may run; what one variant lacks another may have (see `pick`)."""
    name, first = next(iter(tensors.items()))
    reasons = []
    if first.is_cuda or _local.simulating:
        why = "" if _local.simulating else _gpu_refusal(first.device.index)
        if why:
            reasons.append(why)
        if options is not None:  # what the most general kernel refuses, all of them do
            reasons += row.kernels[-1].refuses(tensors, options)
    elif first.device.type != "cpu" or not _interpreting():
        reasons.append(f"{name} is on {first.device.type}; kernels run on CUDA, or on a CPU in Triton's interpreter (TRITON_INTERPRET=1)")
    elif first.dtype == torch.bfloat16 and not device.interpreter_computes_bfloat16:
        reasons.append(f"{name} has dtype torch.bfloat16, which Triton's interpreter computes wrongly")
    if first.dtype == torch.float64:
        reasons.append(f"{name} has dtype torch.float64; kernels serve float16, bfloat16 and float32")
    for argument, given in row.inputs.items():
        tensor = tensors[argument]
        if tensor is not None and not given.differentiable and tensor.requires_grad and torch.is_grad_enabled():
            reasons.append(f"{argument} requires a gradient, which no kernel computes")
    return reasons


def _constant(function: _Function) -> _Function:
    """torch.compiler.assume_constant_result, without the second that its import of Dynamo takes."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def _gpu_refusal(index: int) -> str:
    return device.profile(index).refusal


@_constant
def _interpreting() -> bool:
    return device.interpreting()


def pick(row: Mechanism, tensors: Tensors, options: Options) -> Kernel:
    """The newest kernel that serves these very tensors. Called inside the operator, where strides and addresses are real."""
    reasons = variant_refusals(row, tensors, options)
    for kernel in row.kernels:
        if not reasons[kernel.name]:
            return kernel
    raise Unsupported(f"{row.name}: " + "; ".join(f"{name}: {why}" for name, all_of in reasons.items() for why in all_of))


def variant_refusals(row: Mechanism, tensors: Tensors, options: Options) -> dict[str, tuple[str, ...]]:
    """Per kernel, why it does not serve these tensors. A CPU, where the interpreter runs, takes the most general kernel."""
    first = next(iter(tensors.values()))
    if not first.is_cuda:
        return {
            kernel.name: () if kernel is row.kernels[-1] else ("the interpreter runs the most general kernel",) for kernel in row.kernels
        }
    capability = device.profile(first.device.index).capability
    return {kernel.name: tuple(capability_refusal(kernel, capability) or kernel.refuses(tensors, options)) for kernel in row.kernels}


def capability_refusal(kernel: Kernel, capability: tuple[int, int]) -> list[str]:
    """Why a kernel does not run on GPUs of a capability."""
    if capability in kernel.capabilities:
        return []
    known = ", ".join(map(device.architecture, kernel.capabilities)) or "no GPU yet"
    return [f"compiled and checked for {known}, not for {device.architecture(capability)}"]


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """What `function(*args, **kwargs)` would run and why, without running it: implementation, tiles, reasons against the others.

    >>> print(triton_attn.explain(triton_attn.attention, query, key, value, causal=True))
    """
    _local.explaining = True
    try:
        function(*args, **kwargs)
    except _Explained as stop:
        return stop.explanation
    finally:
        _local.explaining = False
    name = getattr(function, "__qualname__", type(function).__qualname__)
    raise ArgumentError("explain", "function", f"is {name}, which made no call of this package")


def explaining() -> bool:
    """Whether calls are to be explained instead of run."""
    return _local.explaining


def stop_and_explain(row: Mechanism, tensors: Tensors, options: Options) -> None:
    """End the call under `explain`."""
    raise _Explained(explanation(row, tensors, options))


def explanation(row: Mechanism, tensors: Tensors, options: Options) -> Explanation:
    """What a checked call would run."""
    from triton_attn import tiles

    asked = backend()
    path = choose(row, tensors, options)
    first = next(iter(tensors.values()))
    if path != "kernel":
        why = (f"{asked} was asked for",) if asked == path else tuple(refusals(row, tensors, options)) or ("auto takes portable on a CPU",)
        return Explanation(row.name, path, reasons={"a kernel": why})
    kernel = pick(row, tensors, options)
    reasons = {name: why for name, why in variant_refusals(row, tensors, options).items() if why}
    code = kernel.load()
    key, splits = code.key(tensors, options), code.splits(tensors, options)
    found = {}
    # variants without a backward of their own share the most general kernel's
    general = row.kernels[-1]
    shared = [] if kernel is general else [(general, launch) for launch in general.launches if launch.gradients]
    for owner, launch in [*((kernel, launch) for launch in kernel.launches), *shared]:
        if not launch.gradients and launch.shared != (splits > 1):
            continue
        full = f"{row.name}/{owner.name}/{launch.name}"
        if first.is_cuda:
            tile = tiles.look_up(full, owner.load().spaces[launch.name], key, device.profile(first.device.index))
            found[launch.name] = f"tile {tile.tile}, {tile.source}{', stale' if tile.stale else ''}"
        else:
            found[launch.name] = f"tile {tiles.INTERPRETED}, interpreted"
        if launch.shared:
            found[launch.name] += f"; {splits} programs share the keys of each query"
    return Explanation(row.name, path, kernel.name, reasons, found)


def warn_once(row: Mechanism, tensors: Tensors, options: Options) -> None:
    """Say why a call on a GPU took its portable path without having been asked to. torch.compile refuses warnings."""
    if backend() != "auto" or torch.compiler.is_compiling():
        return
    text = f"triton_attn.{row.name} takes its portable path: {'; '.join(refusals(row, tensors, options))}"
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, stacklevel=4)
