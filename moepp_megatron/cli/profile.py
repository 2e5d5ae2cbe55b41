"""`moepp profile RUN`: where the communication time of a run goes."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from moepp_megatron.cli.options import JsonOption


def profile(
    run: Annotated[
        Path,
        Argument(
            help="Analyse this run, which needs training.profile_steps, or a folder of torch "
            "profiler traces.",
            metavar="RUN",
        ),
    ],
    step: Annotated[
        int | None,
        Option(
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
    from moepp_megatron.runtime.atomic import write_json
    from moepp_megatron.tools.profiling.analysis import analyse
    from moepp_megatron.tools.profiling.document import document
    from moepp_megatron.tools.report.profile import print_profile

    profile = analyse(run, step)
    numbers = document(profile)
    if json_file is not None:
        write_json(json_file, numbers)
    print_profile(profile, numbers)
