"""Shows a run on a terminal until it has ended or the user stops."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.live import Live

from moepp_megatron.workbench.report.live.frame import Size, build_frame
from moepp_megatron.workbench.report.live.glyphs import glyphs_of
from moepp_megatron.workbench.report.live.run import LiveRun


def print_frame(run: LiveRun, console: Console) -> None:
    """Print one frame of any length."""
    run.poll()
    frame = build_frame(run, Size(console.width), glyphs_of(console))
    console.print(frame, highlight=False)


def watch(
    run: LiveRun,
    console: Console,
    interval_s: float,
    *,
    until_over: bool = True,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Shows frames until the run is over or Ctrl-C; then leaves the last one in the terminal.

    Args:
        run: The run.
        console: A terminal.
        interval_s: Time between frames.
        until_over: Whether to end with the run.
        sleep: Function that waits.
    """
    glyphs = glyphs_of(console)
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                run.poll()
                size = Size(console.width, console.height)
                live.update(build_frame(run, size, glyphs), refresh=True)
                if until_over and run.health().is_over:
                    break
                sleep(interval_s)
    except KeyboardInterrupt:
        pass
    print_frame(run, console)
