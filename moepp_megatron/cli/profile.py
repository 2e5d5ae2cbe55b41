"""`moepp profile RUN`: where the communication time of a run goes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moepp_megatron.cli.echo import echo
from moepp_megatron.cli.options import JsonOption
from moepp_megatron.config import ConfigError

if TYPE_CHECKING:
    from moepp_megatron.tools.profiling.analysis import Profile


def profile(
    run: Annotated[
        Path,
        typer.Argument(
            help="Analyse this run, which needs training.profile_steps, or a folder of torch "
            "profiler traces, or a file or folder of dumps of torch's flight recorder.",
            metavar="RUN",
        ),
    ],
    step: Annotated[
        int | None,
        typer.Option(
            help="Analyse this recorded step; by default, all of them and their mean.",
            metavar="STEP",
        ),
    ] = None,
    json_file: JsonOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write profile.html to this folder; by default, to RUN.", metavar="DIR"),
    ] = None,
) -> None:
    """Show where a run's communication time goes: tables and a page.

    Examples:
        moepp profile runs/mine
        moepp profile runs/mine --step 21 --out profile
    """
    from moepp_megatron.tools.profiling.summary import records_only_collectives

    try:
        if records_only_collectives(run):
            _recording(run, json_file)
        else:
            _profile(run, step, json_file, out)
    except OSError as error:
        raise ConfigError(
            f"{error.filename} cannot be written ({error.strerror}); give --out or --json a place "
            "that can"
        ) from None


def _profile(
    run: Path,
    step: int | None,
    json_file: Path | None,
    out: Path | None,
) -> None:
    """Analyse torch profiler traces."""
    import json

    from moepp_megatron.file_names import PROFILE_PAGE
    from moepp_megatron.runtime.atomic import write_atomic
    from moepp_megatron.tools.profiling.analysis import analyse
    from moepp_megatron.tools.profiling.document import document
    from moepp_megatron.tools.report.profile.findings import findings
    from moepp_megatron.tools.report.profile.page import render
    from moepp_megatron.tools.report.profile.tables import print_tables, profile_tables

    profile: Profile = analyse(run, step)
    numbers = document(profile)
    folder = out or run
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / PROFILE_PAGE
    html = render(profile, numbers)
    write_atomic(page, html.encode("ascii", "xmlcharrefreplace"))
    if json_file is not None:
        write_atomic(json_file, json.dumps(numbers, indent=1).encode())
    print_tables([f"- {sentence}" for sentence in findings(profile)], profile_tables(numbers))
    echo(f"page   {page}")


def _recording(run: Path, json_file: Path | None) -> None:
    """Analyse a source that records only collectives."""
    import json
    from dataclasses import asdict

    from moepp_megatron.runtime.atomic import write_atomic
    from moepp_megatron.tools.profiling.summary import summary_of
    from moepp_megatron.tools.report.profile.tables import print_summary

    summary = summary_of(run)
    if json_file is not None:
        write_atomic(json_file, json.dumps(asdict(summary), indent=1).encode())
    print_summary(summary)
