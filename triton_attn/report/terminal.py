"""Tables and progress on a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as RichTable
from rich.text import Text

from triton_attn.report.tables import Table

Tick = Callable[[str], None]
Step = Callable[[int], None]
PREFIX, FAILED = "triton-attn: ", "failed: "  # of every line on stderr, and of one that tells of a fault
_PIPE_WIDTH = 240  # where nobody wraps lines, no cell is cut


def printable(text: str) -> str:
    """Text in which nothing commands the terminal."""
    return "".join(char if char.isprintable() else " " for char in text)


def show(table: Table, title: str = "") -> None:
    """Print a table on stdout, wrong rows in red."""
    rendered = RichTable(title=title or None, title_justify="left")
    for name, right in zip(table.names, table.right, strict=True):
        rendered.add_column(name, justify="right" if right else "left", overflow="fold")
    for place, cells in enumerate(table.cells):
        rendered.add_row(*(Text(printable(cell)) for cell in cells), style="red" if place in table.wrong else None)
    _console().print(rendered)


def say(text: str, *, wrong: bool = False) -> None:
    """One line on stdout."""
    _console().print(Text(printable(text), style="bold red" if wrong else ""), soft_wrap=True)


def conclude(count: int, counted: str, faults: Sequence[str]) -> None:
    """What is wrong, and then the sum of it all."""
    for fault in faults:
        say(fault, wrong=True)
    verdict = f"{len(faults)} wrong" if faults else "all right" if count else "nothing ran"
    say(f"{count} {counted}: {verdict}", wrong=bool(faults))


def complain(text: str) -> None:
    """One line on stderr."""
    print(f"{PREFIX}{printable(text)}", file=sys.stderr)


@contextlib.contextmanager
def progress(total: int | None, *, json: bool = False) -> Iterator[tuple[Tick, Step]]:
    """A bar on stderr for the time of the block, on a terminal only: (say what is under way, set how many are done)."""
    shown = sys.stderr.isatty() and not (json and sys.stdout.isatty())
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as bar:
        task = bar.add_task("", total=total)
        yield (lambda text: bar.update(task, description=printable(text))), (lambda count: bar.update(task, completed=count))


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False, markup=False, emoji=False)
