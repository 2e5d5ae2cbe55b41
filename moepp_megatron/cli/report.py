"""``moepp report RUN``: rebuilds a run's page."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN")],
) -> None:
    """Rebuild RUN/report.html from RUN/config.yaml and RUN/metrics.jsonl."""
    from moepp_megatron.report import ReportError, build_report

    try:
        page = build_report(run)
    except ReportError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(ReportError.exit_code) from None
    typer.echo(str(page))
