"""`moepp profile RUN`: where the communication time of a run goes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def profile(
    run: Annotated[
        Path,
        typer.Argument(
            help="Folder of a run with training.profile_steps, or of torch profiler traces.",
            metavar="RUN",
        ),
    ],
    step: Annotated[
        int | None, typer.Option(help="One recorded step; by default all, and their mean.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all numbers there.", metavar="FILE")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for profile.html and the merged trace; by default RUN.", metavar="DIR"
        ),
    ] = None,
) -> None:
    """Say where a run's communication time goes: tables, a page, a trace for Perfetto."""
    import json

    from moepp_megatron.observe.atomic import write_atomic
    from moepp_megatron.profiling.analysis import analyse
    from moepp_megatron.profiling.document import document
    from moepp_megatron.profiling.perfetto import merged_trace
    from moepp_megatron.profiling.trace import ProfileError
    from moepp_megatron.report.profile.page import render
    from moepp_megatron.report.profile.terminal import print_profile
    from moepp_megatron.report.profile.words import findings

    folder = out or run
    try:
        found = analyse(run, step)
        numbers = document(found)
        folder.mkdir(parents=True, exist_ok=True)
        page, trace = folder / "profile.html", folder / "profile.perfetto.json.gz"
        write_atomic(page, render(found, numbers).encode("ascii", "xmlcharrefreplace"))
        write_atomic(trace, merged_trace(found))
        if json_file is not None:
            write_atomic(json_file, json.dumps(numbers, indent=1).encode())
    except ProfileError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(ProfileError.exit_code) from None
    except OSError as error:
        typer.echo(
            f"error: {error.filename}: {error.strerror}; give --out or --json a place that can be "
            "written",
            err=True,
        )
        raise typer.Exit(2) from None
    print_profile(numbers, findings(found))
    typer.echo(f"page   {page}\ntrace  {trace}  (ui.perfetto.dev)")
