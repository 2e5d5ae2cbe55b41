"""``moepp report RUN``: rebuilds a run's page."""

from pathlib import Path
from typing import Annotated

import typer

from moepp_megatron.cli.echo import echo
from moepp_megatron.config import ConfigError


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN")],
) -> None:
    """Rebuild RUN/report.html from RUN/config.yaml and RUN/metrics.jsonl."""
    from moepp_megatron.workbench.report import ReportError, build_report

    try:
        page = build_report(run)
    except ReportError as error:
        raise ConfigError(str(error)) from None
    echo(str(page))
