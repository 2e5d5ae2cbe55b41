"""``moepp report RUN``: rebuilds a run's page."""

from pathlib import Path
from typing import Annotated

import typer

from moepp_megatron.cli.echo import echo


def report(
    run: Annotated[Path, typer.Argument(help="Rebuild the page of this run.", metavar="RUN")],
) -> None:
    """Rebuild RUN/report.html from RUN/config.yaml and RUN/metrics.jsonl.

    Examples:
        moepp report runs/quickstart
    """
    from moepp_megatron.workbench.report import build_report

    echo(str(build_report(run)))
