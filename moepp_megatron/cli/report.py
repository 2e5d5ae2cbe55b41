"""``moepp report RUN``: rebuilds a run's page, or compares several runs on one page."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from moepp_megatron.cli.echo import echo


def report(
    run: Annotated[
        list[Path],
        Argument(
            help="Write the page of this run, or one page that compares these runs.", metavar="RUN"
        ),
    ],
    out: Annotated[
        Path | None,
        Option(
            help="Write the page to this file. By default one run's page is RUN/report.html, and "
            "that of several runs is comparison.html.",
            metavar="FILE.html",
        ),
    ] = None,
) -> None:
    """Write a run's page, or one page that compares several runs.

    The page of one run is made of its config.yaml, metrics.jsonl and alerts.jsonl. That of several
    shows losses and FFN shares over tokens, losses after the same tokens, time and FLOPs, step
    times, and the settings that differ. Runs may still be training.

    Examples:
        moepp report runs/quickstart
        moepp report runs/vanilla runs/moepp --out comparison.html
    """
    from moepp_megatron.tools.report.page import build_report

    first, *others = run
    echo(str(build_report(first, *others, out=out)))
