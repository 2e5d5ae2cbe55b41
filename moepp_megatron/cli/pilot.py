"""`moepp pilot`: short paired runs of MoE++ and vanilla on the user's data; does MoE++ pay?"""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from moepp_megatron.cli.echo import echo, warn
from moepp_megatron.cli.options import ConfigArgument, OverridesArgument
from moepp_megatron.config import Layout, check_config, load_config
from moepp_megatron.config.exit_codes import FAILED, STOPPED

if TYPE_CHECKING:
    from moepp_megatron.tools.experiments.pilot.pilot import Pilot


def pilot(
    config: ConfigArgument,
    out: Annotated[
        Path,
        Option(help="Write the pilot to this folder; a second call continues it.", metavar="DIR"),
    ],
    overrides: OverridesArgument = None,
    nproc: Annotated[int, Option(min=1, help="Start this many ranks per run on this machine.")] = 1,
    steps: Annotated[
        int | None,
        Option(
            min=1, help="Train every model for this many steps; by default, training.train_iters."
        ),
    ] = None,
    seeds: Annotated[
        int,
        Option(
            min=1,
            max=100,
            help="Train with this many seeds, from training.seed on. The pilot decides after every "
            "5 of them.",
        ),
    ] = 5,
    collect: Annotated[
        bool,
        Option(
            "--collect",
            help="Run nothing: write the configuration of every run, print the commands of what is "
            "missing, and write the results of what is there. This is for runs that are started "
            "elsewhere, such as by moepp slurm.",
        ),
    ] = False,
) -> None:
    """Find out in short paired runs against vanilla whether MoE++ pays on your data and hardware.

    Vanilla, MoE++, MoE++ for vanilla's time, and vanilla narrowed to MoE++'s compute train with the
    same seeds; speed is timed in sessions of its own. DIR/pilot.json and DIR/pilot.html have the
    results. Finished runs stay finished: a second call continues.

    On several machines, --collect writes DIR/configs/*.yaml, each of which `moepp train` or `moepp
    slurm` takes; a later --collect reads what they wrote to DIR/runs.

    Examples:
        moepp pilot configs/quickstart.yaml --out pilots/mine --nproc 2 --steps 60
        moepp pilot configs/quickstart.yaml --out pilots/other moe.tau=0.5 --nproc 2 --steps 60
    """
    settings = load_config(config, overrides or [])
    from moepp_megatron.tools.experiments.pilot.pilot import SESSIONS, Pilot
    from moepp_megatron.tools.experiments.pilot.verdict import LOOK
    from moepp_megatron.tools.experiments.runner import Interrupted, RunFailed
    from moepp_megatron.tools.report.terminal import progress

    first = settings.training.seed
    whole = Pilot(
        folder=out.resolve(),
        nproc=nproc,
        config=settings,
        steps=steps or settings.training.train_iters,
        seeds=range(first, first + seeds),
        command=shlex.join(["moepp", *sys.argv[1:]]),
    )
    _check_runs(whole, collect)
    whole.claim()
    tokens = whole.steps * settings.training.global_batch_size * settings.model.seq_length
    echo(
        f"{seeds} seeds of 5 models, vanilla for {whole.steps:,} steps ({tokens:,} tokens); "
        f"{SESSIONS} sessions of speed; decided after every {LOOK} seeds"
    )
    try:
        if collect:
            _list_missing(whole)
        else:
            with progress(whole.left) as advance:
                whole = whole.run(advance)
        _show(whole)
    except Interrupted as stop:
        echo(str(stop), err=True)
        raise typer.Exit(STOPPED) from None
    except RunFailed as failure:
        echo(f"error: {failure}", err=True)
        raise typer.Exit(FAILED) from None


def _list_missing(whole: Pilot) -> None:
    """Print the commands of what can be run now and has no result."""
    from moepp_megatron.tools.experiments.runner import missing

    left = missing(whole.trials)
    if left:
        echo(
            f"{len(left)} runs and sessions are missing: start them where the models train, "
            f"sessions one after the other; moepp slurm takes {whole.folder / 'configs'}/*.yaml",
            err=True,
        )
    for trial in left:
        words = ["moepp", *trial.command, "--nproc", str(trial.nproc)]
        echo(f"  {shlex.join(words)}", err=True)


def _show(whole: Pilot) -> None:
    """Write and print the results of seeds that every arm has finished."""
    from moepp_megatron.runtime.atomic import write_json
    from moepp_megatron.tools.experiments.pilot.page import print_pilot, write_pilot_page
    from moepp_megatron.tools.experiments.pilot.pilot import result_of

    found = result_of(whole)
    if found is None:
        echo("no seed is finished by every model yet", err=True)
        return
    numbers, page = whole.folder / "pilot.json", whole.folder / "pilot.html"
    write_json(numbers, asdict(found[0]))
    write_pilot_page(*found, page)
    print_pilot(found[0])
    echo(f"results      {numbers}")
    echo(f"page         {page}")


def _check_runs(whole: Pilot, collect: bool) -> None:
    """Refuse, before the first run, what would stop any of them at its start."""
    from moepp_megatron.data.prepared_data import check_data
    from moepp_megatron.runtime.fit import check_fit

    warn(*check_config(whole.config))
    runs = whole.first_runs
    if collect:
        return
    for run in runs[:3]:
        Layout.from_config(run.config, whole.nproc)
        check_fit(run.config)
    warn(*check_data(whole.config))
