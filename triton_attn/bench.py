"""Time calls against their peers: interleaved in one process, so that a drifting machine drifts for both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from triton_attn import device, dispatch
from triton_attn.mechanism import Case, Mechanism, Work
from triton_attn.testing import inputs

FORWARD, BOTH = "forward", "forward + backward"


@dataclass(frozen=True)
class Timing:
    """One call beside one peer. `ratio` is the peer's time over ours: above 1 we are faster."""

    mechanism: str
    case: str
    sizes: str
    dtype: str
    where: str
    direction: str
    path: str
    milliseconds: float
    peer: str
    peer_milliseconds: float
    ratio: float
    rounds: int
    limit: float | None  # share of the device's roofline; None on a CPU
    noise: float = 0.0  # of the ratio: half of what lies between the 20th and the 80th of the rounds, as share of the median


@dataclass(frozen=True)
class Ceiling:
    """What a GPU can do at most: 16-bit matrix FLOP/s, bytes/s, exponentials/s. Measured on random data where it says so."""

    flops: float
    bandwidth: float
    exponentials: float


# H200: 790 TFLOP/s and 4.3 TB/s measured; 16 exponentials per clock and multiprocessor. The others are data sheets.
CEILINGS = {
    "NVIDIA H200": Ceiling(790e12, 4.3e12, 4.18e12),
    "NVIDIA H100 80GB HBM3": Ceiling(989e12, 3.35e12, 4.18e12),
    "NVIDIA A100-SXM4-80GB": Ceiling(312e12, 2.04e12, 2.44e12),
}


def bench(
    rows: Sequence[Mechanism],
    where: torch.device,
    *,
    lengths: Sequence[int] | None = None,
    seconds: float = float("inf"),
    tick: Callable[[str], None] = lambda text: None,
) -> Iterator[Timing]:
    """Every workload of every row against each of its peers; with `lengths` the first workload with so many tokens instead.

    Past a row's share of `seconds` its other workloads wait.
    """
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    for row in rows:
        start, cases = time.perf_counter(), row.workloads[where.type]
        if lengths is not None:
            cases = tuple(at_length(row, cases[0], length) for length in lengths)
        # every workload forward before any backward, so that a short time shows most
        plan = [(direction, case, peer) for direction in (FORWARD, BOTH) for case in cases for peer in row.peers]
        for done, (direction, case, peer) in enumerate(plan):
            spent = time.perf_counter() - start
            if spent > seconds:
                break
            tick(f"{row.name} {case.name} {direction} beside {peer}")
            yield time_beside(row, case, peer, direction, where, dtype, seconds=min((seconds - spent) / (len(plan) - done), 4.0))


LENGTH = "length "  # how the case of a length is called


def at_length(row: Mechanism, case: Case, length: int) -> Case:
    """The same call with another number of tokens; what is chosen among them shrinks with them."""
    longest = max(size for axis, size in case.sizes.items() if axis in "mnl")
    sizes = {
        axis: length if axis in "mnl" else max(1, size * length // longest) if axis == "k" and "indices" in row.inputs else size
        for axis, size in case.sizes.items()
    }
    return Case(f"{LENGTH}{length}", row.fitted(sizes, case.options), case.options)


def time_beside(
    row: Mechanism, case: Case, peer: str, direction: str, where: torch.device, dtype: torch.dtype, *, seconds: float = 4.0
) -> Timing:
    """Time one workload of one row beside one peer."""
    tensors, options = inputs.draw(row, case, dtype=dtype, device=where)
    tensors.pop("seed", None)
    calls: list[Callable[[], Any]] = [partial(function, **tensors, **options) for function in (row.call, row.peers[peer])]
    if direction == BOTH:
        leaves = [tensor.requires_grad_() for name in row.differentiable if (tensor := tensors[name]) is not None]
        grad = torch.randn_like(calls[0]())
        calls = [partial(_forward_and_backward, call, leaves, grad) for call in calls]
    explained = dispatch.explain(row.call, **tensors, **options)
    our_times, their_times = interleave(calls[0], calls[1], where, seconds=seconds)
    mine, peers = statistics.median(our_times), statistics.median(their_times)
    path = f"kernel {explained.kernel}" if explained.kernel else explained.path
    sizes = " ".join(f"{axis}={size}" for axis, size in case.sizes.items())
    name = device.profile(where.index or 0).name if where.type == "cuda" else "cpu"
    limit = _share_of_limit(row.work(case.sizes, options, dtype.itemsize), direction, name, mine)
    ratios = [b / a for a, b in zip(our_times, their_times, strict=True)]
    ratio, (low, *_, high) = statistics.median(ratios), statistics.quantiles(ratios, n=5)
    noise = (high - low) / 2 / ratio
    short = str(dtype).removeprefix("torch.")
    return Timing(
        row.name, case.name, sizes, short, name, direction, path, 1e3 * mine, peer, 1e3 * peers, ratio, len(our_times), limit, noise
    )


def _forward_and_backward(call: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor) -> None:
    torch.autograd.grad(call(), leaves, grad)


def interleave(
    ours: Callable[[], Any], theirs: Callable[[], Any], where: torch.device, *, seconds: float, least: int = 3, most: int = 200
) -> tuple[list[float], list[float]]:
    """Seconds per call of each, in rounds of ABBA; the first round warms up and does not count."""
    times: tuple[list[float], list[float]] = ([], [])
    start = time.perf_counter()
    for turn in range(most + 1):
        for which in (0, 1) if turn % 2 else (1, 0):
            spent = _time_once((ours, theirs)[which], where)
            if turn:
                times[which].append(spent)
        if turn >= least and time.perf_counter() - start > seconds:
            break
    return times


def _time_once(call: Callable[[], Any], where: torch.device) -> float:
    if where.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _share_of_limit(work: Work, direction: str, name: str, seconds: float) -> float | None:
    ceiling = CEILINGS.get(name)
    if ceiling is None:
        return None
    # a backward pass is five products to the forward's two, and moves about twice the bytes
    factor = 3.5 if direction == BOTH else 1.0
    least = max(factor * work.flops / ceiling.flops, 3 * work.bytes / ceiling.bandwidth if factor > 1 else work.bytes / ceiling.bandwidth)
    return max(least, work.exponentials * (2 if factor > 1 else 1) / ceiling.exponentials) / seconds
