"""Prints tables that are never cut, whatever the terminal's width."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich import box
from rich.console import RenderableType
from rich.measure import Measurement
from rich.table import Table

from moepp_megatron.runtime.terminal import Console

if TYPE_CHECKING:
    from moepp_megatron.tools.report import blocks

# A pipe or a log has no width.
LOG_WIDTH = 150


def wide_console(highlight: bool = False) -> Console:
    """A console on which a pipe or a log is as wide as tables want."""
    console = Console(highlight=highlight)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    return console


def titled_table(title: str, *columns: str, words: int = 0) -> Table:
    """Same as `plain_table`, with its title on the left."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    _add_columns(table, columns, words)
    return table


def plain_table(*columns: str, words: int = 0) -> Table:
    """A table with a rule below its head; the first `words` columns hold words, others numbers."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    _add_columns(table, columns, words)
    return table


def table_of(block: blocks.Table) -> Table:
    """A page's table for the terminal."""
    table = plain_table()
    for place, name in enumerate(block.head):
        is_number = bool(block.rows) and block.rows[0][place].look == "number"
        _add_columns(table, [name], words=0 if is_number else 1)
    for row in block.rows:
        table.add_row(*(cell.text for cell in row))
    return table


def _add_columns(table: Table, columns: Sequence[str], words: int) -> None:
    for place, name in enumerate(columns):
        table.add_column(name, justify="left" if place < words else "right", no_wrap=True)


def print_uncut(*parts: RenderableType) -> None:
    """Print tables and lines, whole whatever the width; square brackets in texts are no markup.

    Lines are wrapped by the terminal. A table that is wider than the terminal is printed at the
    least width at which its cells are whole.
    """
    console = wide_console()
    width = console.width
    for part in parts:
        if isinstance(part, str):
            console.print(part, soft_wrap=True)
            continue
        if isinstance(part, Table):
            _keep_lines(console, part)
        needed = _measure(console, part).minimum
        console.width = max(width, needed)
        console.print(part, crop=False)
        console.width = width


def _keep_lines(console: Console, table: Table) -> None:
    """Make columns that do not wrap as wide as their cells; rich counts their longest words."""
    for column in table.columns:
        if column.no_wrap:
            widths = [_measure(console, cell).maximum for cell in (column.header, *column.cells)]
            column.min_width = max(widths)


def _measure(console: Console, part: RenderableType) -> Measurement:
    return Measurement.get(console, console.options.update(width=10_000), part)


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A function that prints the name of each of `total` measurements on stderr."""
    console = Console(stderr=True)
    done = iter(range(1, total + 1))
    yield lambda what: console.print(f"[{next(done)}/{total}] {what}")
