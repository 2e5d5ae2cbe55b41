"""`moepp profile RUN`: where the communication time of a run goes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from moepp_megatron.cli.options import JsonOption


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
) -> None:
    """Show where a run's communication time goes.

    Examples:
        moepp profile runs/mine
        moepp profile runs/mine --step 21 --json profile.json
    """
    import json
    from dataclasses import asdict

    from moepp_megatron.runtime.atomic import write_result
    from moepp_megatron.tools.profiling.analysis import analyse
    from moepp_megatron.tools.profiling.document import document
    from moepp_megatron.tools.profiling.summary import records_only_collectives, summary_of
    from moepp_megatron.tools.report.profile import print_profile, print_summary

    if records_only_collectives(run):
        summary = summary_of(run)
        numbers, show = asdict(summary), partial(print_summary, summary)
    else:
        profile = analyse(run, step)
        numbers = document(profile)
        show = partial(print_profile, profile, numbers)
    if json_file is not None:
        write_result(json_file, json.dumps(numbers, indent=1).encode())
    show()
