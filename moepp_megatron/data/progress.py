"""Progress by bytes: a bar on a terminal, a few plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from moepp_megatron.runtime.terminal import Console

_SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def track(console: Console, label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show progress while the block runs; yield a function to call with the bytes just done."""
    if console.is_terminal:
        from rich import progress

        columns = (
            progress.TextColumn("{task.description:>9}"),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
        )
        with progress.Progress(*columns, console=console) as bar:
            task = bar.add_task(label, total=total)
            yield lambda size: bar.advance(task, size)
    else:
        yield _plain_lines(console, label, total)


def _plain_lines(console: Console, label: str, total: int) -> Callable[[int], None]:
    start = shown = time.perf_counter()
    done = 0
    is_complete = False

    def advance(size: int) -> None:
        nonlocal done, is_complete, shown
        done += size
        now = time.perf_counter()
        # The end is said once, though files may have grown or empty ones come last.
        if not is_complete and (now - shown > _SECONDS_BETWEEN_LINES or done >= total):
            shown, is_complete = now, done >= total
            speed = done / 1e6 / max(now - start, 1e-9)
            console.print_line(
                f"{label}: {done / 1e6:.1f} of {total / 1e6:.1f} MB, {speed:.1f} MB/s"
            )

    return advance
