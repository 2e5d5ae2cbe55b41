"""Shows the progress of a measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from moepp_megatron.runtime.terminal import Console


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar over `total` measurements; plain lines where there is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        done = iter(range(1, total + 1))
        yield lambda what: console.print(f"[{next(done)}/{total}] {what}")
        return
    columns = (TextColumn("{task.description:<34}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total, completed=-1)
        yield lambda what: bar.update(task, advance=1, description=what)
        bar.update(task, completed=total)
