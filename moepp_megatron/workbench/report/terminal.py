"""Prints tables that are never cut, whatever the terminal's width."""

from __future__ import annotations

from rich import box
from rich.console import RenderableType
from rich.measure import Measurement
from rich.table import Table

from moepp_megatron.runtime.terminal import Console

# A pipe or a log has no width of its own.
_LOG_WIDTH = 120


def plain_table(*columns: str, words: int = 0) -> Table:
    """A table with a rule below its head and nothing around it.

    Args:
        columns: Names of the columns.
        words: Number of columns, from the left, that hold words; the rest hold numbers.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for place, name in enumerate(columns):
        is_text = place < words
        table.add_column(name, justify="left" if is_text else "right", no_wrap=True)
    return table


def print_whole(*parts: RenderableType) -> None:
    """Print tables and lines; no cell, number or line of it is cut, whatever the width.

    Lines are wrapped by the terminal. A table that is wider than the terminal is printed at the
    least width at which its cells are whole. Square brackets in texts are no markup.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _LOG_WIDTH
    width = console.width
    for part in parts:
        if isinstance(part, str):
            console.print(part, soft_wrap=True)
            continue
        needed = Measurement.get(console, console.options.update(width=10_000), part).minimum
        console.width = max(width, needed)
        console.print(part, crop=False)
        console.width = width
