"""`moepp monitor RUN`: shows a running run in the terminal, or serves runs to Prometheus."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from moepp_megatron.cli.echo import echo
from moepp_megatron.config import ConfigError


def monitor(
    run: Annotated[
        list[Path],
        Argument(
            help="Show this run; with --prometheus, serve several, or all in these folders.",
            metavar="RUN",
        ),
    ],
    interval: Annotated[
        float,
        Option(min=0.1, max=3600.0, help="Show new numbers this often.", metavar="SECONDS"),
    ] = 2.0,
    once: Annotated[
        bool,
        Option("--once", help="Print the numbers once and stop, as is done without a terminal."),
    ] = False,
    prometheus: Annotated[
        int | None,
        Option(
            min=1,
            max=65535,
            help="Serve the newest records on this port of --bind until stopped.",
            metavar="PORT",
        ),
    ] = None,
    bind: Annotated[
        str, Option(help="Let --prometheus listen on this address.", metavar="ADDRESS")
    ] = "127.0.0.1",
) -> None:
    """Show a run: whether it is alive, the newest numbers, alerts.

    It waits for a run that has not started, continues through resumes, and ends with the run or on
    Ctrl-C.

    Examples:
        moepp monitor runs/quickstart
        moepp monitor runs --prometheus 9400
    """
    if once and prometheus is not None:
        raise ConfigError(
            "--once (true) must not come with --prometheus, which serves until stopped; use one"
        )
    if len(run) > 1 and prometheus is None:
        raise ConfigError(
            f"RUN ({len(run)} folders) must be one, which is shown; "
            "name one, or serve all of them with --prometheus PORT"
        )
    from moepp_megatron.runtime.terminal import Console
    from moepp_megatron.tools.report.live.run import LiveRun
    from moepp_megatron.tools.report.live.table import print_run, watch

    console = Console()
    if prometheus is not None and (not _serve(run, prometheus, bind) or not console.is_terminal):
        from moepp_megatron.tools.report.live.prometheus import wait_until_stopped

        wait_until_stopped()
        return
    # A name for `.` too.
    live = LiveRun(run[0] if run[0].name else run[0].absolute())
    if once or not console.is_terminal:
        print_run(live, console)
    else:
        watch(live, console, interval, until_over=prometheus is None)


def _serve(folders: list[Path], port: int, bind: str) -> bool:
    """Begins to serve; returns whether there is one run, which can be shown too."""
    from moepp_megatron.tools.report.live.prometheus import LiveRuns, is_open, serve

    runs = LiveRuns(folders)
    address = serve(runs, port, bind)
    if is_open(bind):
        echo(
            f"warning: --bind ({bind}) lets other machines read these numbers, "
            "without a password and unencrypted; use 127.0.0.1 and a tunnel",
            err=True,
        )
    echo(f"serving {address}")
    return runs.has_one_run
