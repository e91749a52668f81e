"""Tables of tiles: what was compiled, tuned and ranked, and what nobody has tuned."""

from __future__ import annotations

from collections.abc import Sequence

from triton_attn.offline import Compiled
from triton_attn.report.calls import Call
from triton_attn.report.candidates import Candidates
from triton_attn.report.tables import NOT_RUN, Table, faulty, milliseconds, percent, share_of
from triton_attn.tuning.ranking import Correlation, Ranked
from triton_attn.tuning.tune import Trial, winner


def coverage(rows: Sequence[Call]) -> Table:
    """For each mechanism and GPU how many launches of its workloads have a tile tuned for their lengths, one chosen offline, or neither."""
    groups: dict[tuple[str, str], list[Call]] = {}
    for row in rows:
        if row.tiles or row.where.startswith("sm_"):
            groups.setdefault((row.mechanism, row.where), []).append(row)
    cells = []
    for names, group in groups.items():
        tiles = [tile for row in group for tile in row.tiles.values()]
        tuned = sum("tuned on" in tile for tile in tiles)
        offline = sum("(offline" in tile for tile in tiles)
        stale = sum("stale" in tile for tile in tiles)
        portable = sum(not row.kernel for row in group)
        cells.append((*names, str(len(group)), str(portable), *map(str, (tuned, offline, len(tiles) - tuned - offline, stale))))
    titles = ("mechanism", "GPU", "workloads>", "by no kernel>", "launches tuned>", "chosen offline>", "first of space>", "stale>")
    return Table(titles, cells)


def uncovered(rows: Sequence[Call]) -> Table:
    """Every launch of a workload whose tile nobody has tuned for its lengths: which tile it gets, and whence."""
    cells = [
        (row.mechanism, row.where, row.sizes, row.dtype, launch, *tile.removeprefix("tile ").partition(", ")[::2])
        for row in rows
        for launch, tile in row.tiles.items()
        if "tuned on" not in tile
    ]
    return Table(("mechanism", "GPU", "sizes", "dtype", "launch", "tile", "from"), cells)


def tuned(rows: Sequence[Trial]) -> Table:
    """One line for each launch and key: the fastest right tile beside the first candidate, and what became of the others."""
    groups: dict[tuple[str, str, str], list[Trial]] = {}
    for row in rows:
        groups.setdefault((row.launch, row.key, row.sizes), []).append(row)
    cells, wrong = [], []
    for place, (names, group) in enumerate(groups.items()):
        best, first = winner(group), group[0].milliseconds
        gain = f"{first / best.milliseconds:.2f}×" if best and best.milliseconds and first else "-"
        time = milliseconds(best.milliseconds) if best and best.milliseconds is not None else NOT_RUN
        spread = percent(best.spread) if best and best.spread is not None else "-"
        faulty = sum(1 for row in group if row.fault)
        cells.append((*names, best.tile if best else "none is right", time, spread, gain, str(len(group)), str(faulty)))
        if best is None:
            wrong.append(place)
    titles = ("launch", "key", "sizes", "fastest right tile", "time>", "spread>", "gain over the first>", "tried>", "not fit to run>")
    return Table(titles, cells, frozenset(wrong))


def candidates(rows: Sequence[Candidates]) -> Table:
    """One line for each launch and key whose candidates were all compiled: what a call gets, and where that stands by predicted time."""
    cells = []
    for row in rows:
        one, runs = row.ranked[0], sum(not each.fault for each in row.ranked)
        slower = row.over_the_best(row.gets)
        over = "-" if slower is None else f"{slower:.2f}×"
        names = (one.launch, one.target, one.key, one.sizes, f"{row.gets}, {row.source}")
        cells.append((*names, row.place(row.gets), over, one.tile, row.first, row.place(row.first), str(len(row.ranked)), str(runs)))
    numbers = ("its place>", "over the least>", "least predicted", "first of space", "place of that>", "candidates>", "may run>")
    return Table(("launch", "target", "key", "sizes", "a call gets", *numbers), cells)


def ranked(rows: Sequence[Ranked]) -> Table:
    """One launch's tiles by predicted time, with what each takes of a multiprocessor."""
    cells = []
    for row in rows:
        time = "-" if row.milliseconds is None else milliseconds(row.milliseconds)
        used = tuple("-" if number is None else str(number) for number in (row.registers, row.spilled, row.shared))
        cells.append((str(row.place), row.tile, *used, str(row.blocks), time, row.bound, str(row.listed), row.fault or "may run"))
    titles = (
        "place>",
        "tile",
        "registers>",
        "spilled B>",
        "shared B>",
        "blocks>",
        "predicted>",
        "most time in",
        "in hand order>",
        "verdict",
    )
    return Table(titles, cells, faulty(rows))


def correlations(rows: Sequence[Correlation]) -> Table:
    """How far the predicted order of each launch's tiles agrees with another."""
    cells = [
        (row.launch, row.target, row.key, row.beside, str(row.tiles), "too few" if row.spearman is None else f"{row.spearman:+.2f}")
        for row in rows
    ]
    return Table(("launch", "target", "key", "beside", "tiles>", "rank correlation>"), cells)


def kernels(rows: Sequence[Compiled]) -> Table:
    """Every compiled launch."""
    cells = []
    for row in rows:
        used = row.usage
        numbers: tuple[str, ...] = ("-",) * 5
        if used is not None:
            numbers = tuple(map(str, (used.registers, used.spilled, used.shared, used.tensor_core, used.asynchronous)))
        name = f"{row.mechanism}/{row.kernel}/{row.launch}"
        cells.append((name, row.target, row.key, row.tile, *numbers, str(row.blocks), f"{row.seconds:.1f} s", row.fault or "fits"))
    titles = (
        "launch",
        "target",
        "key",
        "tile",
        "registers>",
        "spilled B>",
        "shared B>",
        "tensor-core>",
        "async copies>",
        "blocks>",
        "time>",
    )
    return Table((*titles, "verdict"), cells, faulty(rows))


def resources(rows: Sequence[Compiled]) -> Table:
    """For each mechanism and target what its launches take at most, and how many blocks of the hungriest are resident."""
    groups: dict[tuple[str, str], list[Compiled]] = {}
    for row in rows:
        groups.setdefault((row.mechanism, row.target), []).append(row)
    cells, wrong = [], []
    for place, (names, group) in enumerate(groups.items()):
        used = [row.usage for row in group if row.usage is not None]
        most = [str(max(numbers)) for numbers in zip(*((each.registers, each.spilled, each.shared) for each in used), strict=True)]
        blocks = str(min(row.blocks for row in group)) if used else "-"
        fit = sum(not row.fault for row in group)
        cells.append((*names, share_of(fit, len(group)), *(most or ("-",) * 3), blocks))
        if fit < len(group):
            wrong.append(place)
    titles = ("mechanism", "target", "launches that fit>", "registers, most>", "spilled B, most>", "shared B, most>", "blocks, least>")
    return Table(titles, cells, frozenset(wrong))
