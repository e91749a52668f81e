"""A progress bar and a table on a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

_PIPE_WIDTH = 240  # where nobody wraps lines, no cell is cut


@contextlib.contextmanager
def bar() -> Iterator[Callable[[int, int], None]]:
    """(steps done, of how many), on stderr while the block runs, on a terminal only."""
    columns = (TextColumn("steps"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(compact=True))
    shown = Progress(
        *columns,
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
        redirect_stdout=sys.stdout.isatty(),  # what is piped on stays on stdout
    )
    task = shown.add_task("", total=None)

    def tick(done: int, of: int) -> None:
        if not shown.live.is_started:  # of several processes one ticks
            shown.start()
        shown.update(task, completed=done, total=of)

    try:
        yield tick
    finally:
        shown.stop()


def show(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout; all columns but the first hold numbers."""
    table = Table()
    for place, title in enumerate(titles):
        table.add_column(title, justify="right" if place else "left", overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False, markup=False, emoji=False).print(table)
