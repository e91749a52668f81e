"""How long a compiled tile of a launch would take, by a model: nothing is timed here, and no GPU has confirmed it.

A launch does work t_i on each of a multiprocessor's units: products, memory, second-level cache, shared memory, exponentials. Programs that
are resident together hide part of it behind the slowest unit, the more the more bytes they have under way, f: 16 of each thread, and the
stages that asynchronous copies are filling. By Little's law latency times bandwidth is what keeps memory busy, f_0.

    h(f)    = f / (f + f_0)
    time(r) = r (max_i t_i + (1 - h(r f)) sum_i t_i)            r programs resident on one multiprocessor, t_i of one of them
    total   = full waves * time(blocks) + time(programs of the last wave that share a multiprocessor) + launches

Not modelled: which tensor-core instruction the compiler took, bank conflicts, several loads of one thread, causal programs that end early,
clocks that fall under load.
Source: Williams, Waterman and Patterson, "Roofline", 2009, and Volkov, "Better performance at lower occupancy", 2010.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from triton_attn import device, tiles
from triton_attn.arguments import ArgumentError
from triton_attn.mechanism import Case, Launch, Mechanism
from triton_attn.offline import Part

LATENCY = 4e-7  # seconds until memory answers
VECTOR = 16 * 32  # bytes that one load of a warp brings
LAUNCH = 3e-6  # seconds that a kernel's start and end cost
ITEMSIZE = {"16bit": 2, "float32": 4, "tf32": 4}


@dataclass(frozen=True)
class Demand:
    """What all programs of one launch do together with one tile, padding included."""

    flops: float
    bytes: float  # between memory and cache: each tensor once
    streamed: float  # bytes from the second-level cache, operands that every program reads again
    shared: float  # bytes from shared memory, operands that every warp reads again
    exponentials: float


@dataclass(frozen=True)
class Prediction:
    """A launch's time by the model, infinite where the tile may not run, and the unit that is slowest."""

    milliseconds: float
    bound: str


def peaks_of(profile: device.Profile) -> device.Peaks:
    """The peaks of a device, by its capability and number of multiprocessors; ArgumentError where nobody has written them down."""
    if profile.capability not in device.PEAKS:
        allowed = ", ".join(map(device.architecture, device.PEAKS))
        raise ArgumentError("roofline", "target", f"is {device.architecture(profile.capability)!r}; allowed: {allowed}")
    known = device.PEAKS[profile.capability]
    here = profile.multiprocessors or known.multiprocessors
    share = here / known.multiprocessors
    return replace(
        known,
        multiprocessors=here,
        tensor=known.tensor * share,
        tf32=known.tf32 * share,
        fp32=known.fp32 * share,
        shared=known.shared * share,
        exponentials=known.exponentials * share,
    )


def demand(row: Mechanism, launch: Launch, case: Case, operands: str, tile: tiles.Tile, capability: tuple[int, int]) -> Demand:
    """What a launch does at a call's sizes.

    A softmax launch owns `block_m` queries and streams keys, or owns `block_n` keys and streams queries if it computes no gradient of the
    query. Its backward launches compute scores and their gradients anew, two products as the forward, and one more for each gradient.
    Of other mechanisms the backward launches share `backward_share` by their gradients. A warp's product has its share of the rows, 16 at
    least; on sm_90 four warps read an operand together, for up to 64 rows.
    """
    itemsize, options = ITEMSIZE[operands], {**row.defaults, **case.options}
    work = row.work(case.sizes, options, itemsize)
    if "lse" not in row.outputs:
        part = len(launch.gradients) / max(1, len(row.differentiable))
        factor = row.backward_share * part if launch.gradients else 1.0
        moved = work.bytes * (2 * part if launch.gradients else 1.0)
        return Demand(work.flops * factor, moved, 0.0, 0.0, work.exponentials)
    own_keys = bool(launch.gradients) and "query" not in launch.gradients
    owned, streamed = (tile.block_n, tile.block_m) if own_keys else (tile.block_m, tile.block_n)
    gradients = len({"query", "key", "value"} & set(launch.gradients))
    padding = _padding(case.sizes, options, work.exponentials, owned, streamed, own_keys=own_keys)
    flops, together = work.flops * padding * (1 + gradients / 2), 4 if capability >= (9, 0) and owned >= 64 and tile.num_warps >= 4 else 1
    rows = min(max(16.0, owned * together / tile.num_warps), 64.0 if together > 1 else owned)
    return Demand(
        flops=flops,
        bytes=work.bytes * (1 + gradients / 4),
        streamed=work.flops * padding / 2 / owned * itemsize,
        shared=flops / 2 / rows * itemsize,
        exponentials=work.exponentials * padding,
    )


def _padding(sizes: Mapping[str, int], options: Mapping[str, Any], pairs: float, owned: int, streamed: int, *, own_keys: bool) -> float:
    """Visited pairs of queries and keys over useful ones: the rest of the last tiles, and those that a band's edge cuts."""
    length = sizes.get("n", sizes["m"]) if own_keys else sizes["m"]
    each = pairs / max(1, sizes.get("b", 1) * sizes["h"] * length)  # that one row visits
    if not each:
        return 1.0
    edges = (owned + streamed) * _edges(options) or math.ceil(each / streamed) * streamed - each
    return (each + edges) / each * (math.ceil(length / owned) * owned / length)


def _edges(options: Mapping[str, Any]) -> float:
    """How many slanted edges what a row sees has, of two."""
    window = options.get("window") or any(side is not None and side >= 0 for side in options.get("window_size") or ())
    return 1.0 if window else 0.5 if options.get("causal") else 0.0


def predict(
    asked: Demand, parts: Sequence[Part], operands: str, peaks: device.Peaks, limits: device.Limits, *, stages: int = 1
) -> Prediction:
    """A launch's time. Of several kernels the one with most tensor-core instructions does the work; each further one costs a launch."""
    if not parts or any(tiles.illegal(part.usage, limits) for part in parts):
        return Prediction(math.inf, "may not run")
    main = max(parts, key=lambda part: (part.usage.tensor_core, part.usage.registers))
    used, blocks = main.usage, tiles.blocks_per_multiprocessor(main.usage, limits)
    if not blocks or not main.programs:
        return Prediction(math.inf, "may not run")
    products = peaks.fp32 if not used.tensor_core else peaks.tf32 if operands == "tf32" else peaks.tensor
    units = {
        "products": asked.flops / products,
        "memory": asked.bytes / peaks.bandwidth,
        "cache": (asked.bytes + asked.streamed) / peaks.cache,
        "shared memory": asked.shared / peaks.shared,
        "exponentials": asked.exponentials / peaks.exponentials,
    }
    # of one program on one multiprocessor
    slowest, together = (each * peaks.multiprocessors / main.programs for each in (max(units.values()), sum(units.values())))
    under_way = used.warps * VECTOR + (used.shared * (stages - 1) / stages if used.asynchronous else 0.0)
    wanted = LATENCY * peaks.bandwidth / peaks.multiprocessors

    def time(resident: int) -> float:
        hidden = resident * under_way / (resident * under_way + wanted)
        return resident * (slowest + (1 - hidden) * together)

    full, rest = divmod(main.programs, peaks.multiprocessors * blocks)
    seconds = full * time(blocks) + time(math.ceil(rest / peaks.multiprocessors)) + LAUNCH * len(parts)
    return Prediction(1e3 * seconds, max(units, key=units.__getitem__))


def predict_tile(
    row: Mechanism, launch: Launch, case: Case, operands: str, tile: tiles.Tile, parts: Sequence[Part], profile: device.Profile
) -> Prediction:
    """`predict` for one tile of one launch of a call, whose kernels were compiled into `parts`, on a device that need not be here."""
    asked, limits = demand(row, launch, case, operands, tile, profile.capability), device.LIMITS[profile.capability]
    return predict(asked, parts, operands, peaks_of(profile), limits, stages=tile.num_stages)


def spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Rank correlation: Pearson's of the ranks, equal values sharing theirs. None of fewer than three pairs, or where one side is constant.

    Source: Spearman, "The proof and measurement of association between two things", 1904.
    """
    if len(one) != len(other):
        raise ArgumentError("spearman", "other", f"has {len(other)} values; allowed: {len(one)}, as many as the first")
    if len(one) < 3 or len(set(one)) == 1 or len(set(other)) == 1:
        return None
    return statistics.correlation(_ranks(one), _ranks(other))


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    first = {value: place for place, value in reversed(list(enumerate(ordered)))}
    count = {value: ordered.count(value) for value in first}
    return [first[value] + (count[value] - 1) / 2 for value in values]
