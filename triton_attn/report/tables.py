"""Result rows as tables of text, the same for terminal and page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from triton_attn import device
from triton_attn.bench import BOTH, FORWARD, Timing
from triton_attn.mechanism import Mechanism
from triton_attn.offline import Compiled
from triton_attn.report.calls import Call
from triton_attn.report.caught import Kept
from triton_attn.report.comparison import Change
from triton_attn.teeth import Tooth
from triton_attn.verify import Verdict

NOT_RUN = "not run"


@dataclass(frozen=True)
class Table:
    """Titles and cells; a title that ends in ">" heads a column of numbers, aligned right."""

    titles: tuple[str, ...]
    cells: Sequence[tuple[str, ...]]
    wrong: frozenset[int] = frozenset()  # indices of rows to be marked

    @property
    def names(self) -> list[str]:
        return [title.removesuffix(">") for title in self.titles]

    @property
    def right(self) -> list[bool]:
        return [title.endswith(">") for title in self.titles]


def mechanisms(rows: Iterable[Mechanism]) -> Table:
    """The catalogue."""
    cells = []
    for row in rows:
        kernels = "; ".join(
            f"{kernel.name}: {', '.join(map(device.architecture, kernel.capabilities)) or 'none yet'}" for kernel in row.kernels
        )
        needed = ", ".join(name if given.required else f"{name}?" for name, given in row.inputs.items() if given.kind != "seed")
        cells.append((row.name, row.summary, kernels, needed, ", ".join(row.peers)))
    return Table(("mechanism", "what it is", "kernels and their GPUs", "inputs (? optional)", "timed against"), cells)


def calls(rows: Sequence[Call]) -> Table:
    """What serves each call, where, and why not something else."""
    cells = []
    for row in rows:
        tiles = "; ".join(f"{launch}: {tile}" for launch, tile in row.tiles.items())
        reasons = "; ".join(f"{who}: {why}" for who, all_of in row.reasons.items() for why in all_of)
        cells.append((row.mechanism, row.sizes, row.dtype, row.where, row.serves, tiles, reasons))
    return Table(("mechanism", "sizes", "dtype", "where", "runs", "tiles, and where they come from", "why not the others"), cells)


def checks(rows: Sequence[Verdict]) -> Table:
    """Every verdict."""
    cells = [
        (row.mechanism, row.implementation, row.case, row.dtype, row.where, percent(row.share), row.worst, f"{row.seconds:.2f} s")
        for row in rows
    ]
    titles = ("mechanism", "implementation", "case", "dtype", "where", "worst share>", "in", "time>")
    return Table(titles, cells, faulty(rows))


def changes(rows: Sequence[Change]) -> Table:
    """What differs between two reports."""
    cells = [(row.what, row.before, row.after, row.how) for row in rows]
    return Table(("what", "before>", "now>", "so it is"), cells, frozenset(place for place, row in enumerate(rows) if row.worse))


def directions(rows: Sequence[Verdict]) -> Table:
    """Worst share by mechanism, dtype and direction: outputs, and gradients."""
    groups: dict[tuple[str, str], list[Verdict]] = {}
    for row in rows:
        groups.setdefault((row.mechanism, row.dtype), []).append(row)
    cells = [
        (*names, percent(max(row.forward for row in group)), percent(max(row.backward for row in group))) for names, group in groups.items()
    ]
    return Table(("mechanism", "dtype", "outputs, worst share>", "gradients, worst share>"), cells)


def teeth(rows: Sequence[Tooth]) -> Table:
    """Seeded faults by kernel and kind: planted, caught, changing nothing, survived."""
    groups: dict[tuple[str, str, str], list[Tooth]] = {}
    for row in rows:
        groups.setdefault((row.mechanism, row.kernel, row.kind), []).append(row)
    cells = []
    for names, group in sorted(groups.items()):
        counts = (len(group), sum(bool(row.caught) for row in group), sum(bool(row.equivalent) for row in group))
        cells.append((*names, *map(str, counts), str(sum(bool(row.fault) for row in group))))
    titles = ("mechanism", "kernel", "fault", "planted>", "caught>", "change nothing>", "survived>")
    return Table(titles, cells, frozenset(i for i, cell in enumerate(cells) if cell[-1] != "0"))


def caught(kept: Mapping[str, Kept], stale: Container[str], catalog: Mapping[str, Mechanism]) -> Table:
    """One line for each kernel: how many of its seeded faults were caught when somebody last planted them."""
    cells, wrong = list[tuple[str, ...]](), []
    for row in catalog.values():
        for kernel in row.kernels:
            entry = kept.get(name := f"{row.name}/{kernel.name}")
            if entry is None:
                cells.append((name, *(NOT_RUN,) * 4, ""))
                continue
            if entry.survived:
                wrong.append(len(cells))
            counts = tuple(map(str, (entry.planted, entry.caught, entry.argued, entry.survived)))
            changed = "; the kernel has changed since" if name in stale else ""
            cells.append((name, *counts, f"{entry.command}, triton {entry.triton}{changed}"))
    return Table(("kernel", "planted>", "caught>", "argued>", "survived>", "by"), cells, frozenset(wrong))


def checks_by_implementation(rows: Sequence[Verdict], catalog: Mapping[str, Mechanism]) -> Table:
    """One line for everything that an implementation was put through."""
    groups: dict[tuple[str, str, str], list[Verdict]] = {}
    for row in rows:
        groups.setdefault((row.mechanism, row.implementation, row.where), []).append(row)
    cells, wrong = [], []
    for place, (group, members) in enumerate(groups.items()):
        worst = max(members, key=lambda row: row.share)
        known = len(catalog[group[0]].cases) if group[0] in catalog else 0
        covered = f"{len({row.case for row in members})} of {known}"
        dtypes = ", ".join(dict.fromkeys(row.dtype for row in members))
        failed = sum(1 for row in members if row.fault)
        cells.append((*group, dtypes, covered, str(len(members)), str(failed), percent(worst.share), f"{worst.worst}, {worst.case}"))
        if failed:
            wrong.append(place)
    titles = ("mechanism", "implementation", "where", "dtypes", "cases>", "checks>", "wrong>", "worst share>", "in")
    return Table(titles, cells, frozenset(wrong))


def timings(rows: Sequence[Timing]) -> Table:
    """Every timing."""
    cells = []
    for row in rows:
        limit = "-" if row.limit is None else percent(row.limit)
        times = (
            milliseconds(row.milliseconds),
            row.peer,
            milliseconds(row.peer_milliseconds),
            f"{row.ratio:.2f}",
            limit,
            str(row.rounds),
        )
        cells.append((row.mechanism, row.case, row.sizes, row.dtype, row.direction, row.path, *times))
    titles = ("mechanism", "case", "sizes", "dtype", "direction", "path", "time>", "peer", "its time>", "ratio>", "of limit>", "rounds>")
    return Table(titles, cells)


def summary(
    names: Iterable[str], called: Sequence[Call], verdicts: Sequence[Verdict], compiled: Sequence[Compiled], timed: Sequence[Timing]
) -> Table:
    """One line per mechanism."""
    cells, wrong = [], []
    for place, name in enumerate(names):
        path = next((row.serves for row in called if row.mechanism == name and not row.where.startswith("sm_")), NOT_RUN)
        checked = [row for row in verdicts if row.mechanism == name]
        right = sum(1 for row in checked if not row.fault)
        shares = percent(max(row.share for row in checked)) if checked else NOT_RUN
        built = [row for row in compiled if row.mechanism == name]
        fits = sum(1 for row in built if not row.fault)
        ratios = [_ratio(timed, name, direction) for direction in (FORWARD, BOTH)]
        cells.append((name, path, share_of(right, len(checked)), shares, share_of(fits, len(built)), *ratios))
        if right < len(checked) or fits < len(built):
            wrong.append(place)
    titles = (
        "mechanism",
        "a call here runs",
        "checks right>",
        "worst share>",
        "kernels that fit>",
        "speed, forward>",
        "forward + backward>",
    )
    return Table(titles, cells, frozenset(wrong))


def machine(facts: Mapping[str, Any]) -> Table:
    """The machine in two columns."""
    cells = [
        (name, "none" if value in (None, [], "") else str(value)) for name, value in facts.items() if name not in ("gpus", "interpreter")
    ]
    for index, gpu in enumerate(facts.get("gpus", ())):
        gibibytes = gpu["memory"] / 2**30
        capability = ".".join(map(str, gpu["capability"]))
        text = f"{gpu['name']}, capability {capability}, {gpu['multiprocessors']} multiprocessors, {gibibytes:.0f} GiB"
        cells.append((f"GPU {index}", f"{text}; no kernel runs on it: {gpu['refusal']}" if gpu["refusal"] else text))
    if not facts.get("gpus"):
        cells.append(("GPU", "none"))
    return Table(("what", "here"), cells)


def percent(share: float) -> str:
    """ "27 %"; what is not finite says so."""
    return f"{100 * share:.{0 if share >= 0.1 else 1}f} %" if math.isfinite(share) else "not finite"


def milliseconds(time: float) -> str:
    """ "1.5 ms"."""
    return f"{time:.0f} ms" if time >= 100 else f"{time:.3g} ms"


def _ratio(timed: Sequence[Timing], name: str, direction: str) -> str:
    ratios = [row.ratio for row in timed if row.mechanism == name and row.direction == direction]
    if not ratios:
        return NOT_RUN
    spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
    return f"{statistics.median(ratios):.2f}×{spread}"


def share_of(part: int, whole: int) -> str:
    """ "3 of 4"; of nothing: not run."""
    return f"{part} of {whole}" if whole else NOT_RUN


def faulty(rows: Sequence[Any]) -> frozenset[int]:
    """Which rows have a fault."""
    return frozenset(place for place, row in enumerate(rows) if row.fault)
