"""`moepp monitor RUN`: a run as it goes on, on the terminal and for Prometheus."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moepp_megatron.config import ConfigError
from moepp_megatron.config.printable import printable


def monitor(
    run: Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN")],
    interval: Annotated[
        float, typer.Option(min=0.1, max=3600.0, help="Seconds between frames.")
    ] = 2.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print one frame and stop, as without a terminal.")
    ] = False,
    prometheus: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65535,
            help="Serve the newest record on this port of --bind, until stopped.",
            metavar="PORT",
        ),
    ] = None,
    bind: Annotated[
        str, typer.Option(help="Address that --prometheus listens on.", metavar="ADDRESS")
    ] = "127.0.0.1",
) -> None:
    """Show how a run goes: loss, FFN share, experts of each layer, alerts, speed, energy.

    Waits for a run that has not started, goes on through resumes, ends with the run (or Ctrl-C).
    """
    if once and prometheus is not None:
        raise ConfigError(
            "--once (true) must not come with --prometheus, which serves until stopped; use one"
        )
    from moepp_megatron.report.live.run import LiveRun
    from moepp_megatron.report.live.screen import print_frame, watch
    from moepp_megatron.report.run_data import ReportError
    from moepp_megatron.runtime.terminal import Console

    console = Console()
    try:
        live = LiveRun(run)
        if prometheus is not None:
            from moepp_megatron.report.live.prometheus import is_open, serve, wait_until_stopped

            address = serve(LiveRun(run), prometheus, bind)
            if is_open(bind):
                typer.echo(
                    f"warning: --bind ({bind}) lets other machines read this run's numbers, "
                    "without a password and unencrypted; use 127.0.0.1 and a tunnel",
                    err=True,
                )
            typer.echo(f"serving {address}")
            if not console.is_terminal:
                wait_until_stopped()
                return
        if once or not console.is_terminal:
            print_frame(live, console)
        else:
            watch(live, console, interval, until_over=prometheus is None)
    except ReportError as error:
        typer.echo(f"error: {printable(str(error))}", err=True)
        raise typer.Exit(ReportError.exit_code) from None
