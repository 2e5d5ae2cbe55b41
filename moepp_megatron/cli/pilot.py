"""`moepp pilot`: short paired runs of MoE++ and vanilla on the user's data; does MoE++ pay?"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moepp_megatron.cli.echo import echo
from moepp_megatron.cli.options import (
    ConfigArgument,
    OverridesArgument,
)
from moepp_megatron.config import Config, Layout, check_config, load_config

if TYPE_CHECKING:
    from moepp_megatron.workbench.experiments.pilot.procedure import Pilot
    from moepp_megatron.workbench.experiments.pilot.runs import PilotRun


def pilot(
    config: ConfigArgument,
    out: Annotated[
        Path,
        typer.Option(
            help="Write the pilot to this folder; a second call continues it.", metavar="DIR"
        ),
    ],
    overrides: OverridesArgument = None,
    nproc: Annotated[
        int, typer.Option(min=1, help="Start this many ranks per run on this machine.")
    ] = 1,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Train every model for this many steps; by default, training.train_iters."
        ),
    ] = None,
    seeds: Annotated[
        int,
        typer.Option(
            min=1,
            max=100,
            help="Train with this many seeds, from training.seed on. The first call fixes how many "
            "a look takes, at least 3; further looks are at multiples of it.",
        ),
    ] = 5,
    sessions: Annotated[
        int,
        typer.Option(min=2, max=50, help="Time MoE++ and vanilla in turn in this many sessions."),
    ] = 5,
    eval_iters: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Validate on this many global batches; by default, on as many as configured, and "
            "on at least 8.",
        ),
    ] = None,
    collect: Annotated[
        bool,
        typer.Option(
            "--collect",
            help="Run nothing: write the configuration of every run, and the results of those that "
            "are there. This is for runs that are started elsewhere, such as by moepp slurm.",
        ),
    ] = False,
) -> None:
    """Find out in short paired runs against vanilla whether MoE++ pays on your data and hardware.

    Vanilla, MoE++, MoE++ for vanilla's time, and vanilla narrowed to MoE++'s compute train with the
    same seeds; speed is timed in sessions of its own. DIR/pilot.json and DIR/pilot.html have the
    results. Finished runs stay finished: a second call continues.

    On several machines, --collect writes DIR/configs/*.yaml, each of which `moepp train` or `moepp
    slurm` takes; a later --collect reads what they have left in DIR/runs.

    Examples:
        moepp pilot configs/quickstart.yaml --out pilots/mine --nproc 2 --steps 60
        moepp pilot configs/quickstart.yaml --out pilots/other moe.tau=0.5 --nproc 2 --steps 60
    """
    settings = load_config(config, overrides or [])
    from moepp_megatron.workbench.experiments.pilot.arms import build_arms
    from moepp_megatron.workbench.experiments.pilot.plan import Plan
    from moepp_megatron.workbench.experiments.pilot.procedure import Pilot
    from moepp_megatron.workbench.experiments.pilot.runs import PilotRuns
    from moepp_megatron.workbench.experiments.pilot.schedule import FEWEST_SEEDS

    arms = build_arms(settings, steps or settings.training.train_iters, eval_iters)
    first = settings.training.seed
    folder = PilotRuns(out.resolve(), nproc)
    numbers = list(range(first, first + seeds))
    runs = folder.all_of(arms, numbers)
    _check_runs(settings, runs, nproc, collect)
    folder.claim(runs)
    plan = Plan(first=max(seeds, FEWEST_SEEDS), sessions=sessions)
    whole = Pilot(
        folder=folder,
        config=settings,
        base=arms,
        seeds=numbers,
        plan=Plan.claim(folder.path, plan),
        command=shlex.join(["moepp", *sys.argv[1:]]),
        eval_iters=eval_iters,
    )
    _run_and_write(whole, collect)


def _run_and_write(whole: Pilot, collect: bool) -> None:
    from moepp_megatron.workbench.experiments.runs import Interrupted, RunFailed

    try:
        _announce(whole)
        whole = _collected(whole) if collect else _run(whole)
        _finish(whole)
    except Interrupted as stop:
        from moepp_megatron.runtime.launch import STOPPED

        echo(str(stop), err=True)
        raise typer.Exit(STOPPED) from None
    except RunFailed as failure:
        echo(f"error: {failure}", err=True)
        raise typer.Exit(1) from None


def _announce(whole: Pilot) -> None:
    runs = whole.folder.all_of(whole.base, whole.seeds)
    done = len(runs) - len(whole.folder.unfinished(runs))
    training = runs[0].config.training
    per_step = training.global_batch_size * runs[0].config.model.seq_length
    steps = whole.base[0].arm.steps
    echo(
        f"{len(runs)} runs of {steps:,} steps ({steps * per_step:,} tokens): {len(whole.seeds)} "
        f"seeds of {len(whole.base)} models" + (f"; {done} runs are there already" if done else "")
    )
    for arm in whole.base:
        phi = arm.config.moe.ffn_share
        share = "" if phi == 1 else f", FFN share {phi:.0%} if balanced"
        echo(f"  {arm.arm.name}: {arm.arm.steps:,} steps{share}")
    echo(
        f"then {whole.plan.sessions} sessions of speed, MoE++ for vanilla's time and vanilla in "
        f"MoE++'s compute; decided after every {whole.plan.first} seeds"
    )


def _run(whole: Pilot) -> Pilot:
    """Do what is missing; results are written after each seed of the last stage."""
    from moepp_megatron.workbench.report.progress import progress

    left = len(whole.folder.unfinished(whole.runs()))
    if not whole.matched:
        left += whole.plan.sessions + 2 * len(whole.seeds)
    with progress(left) as advance:
        return whole.run(advance, _write)


def _collected(whole: Pilot) -> Pilot:
    """Write what can be run now, and say how to time MoE++ where that comes next."""
    from moepp_megatron.workbench.experiments.pilot.sessions import SpeedSessions

    timed = SpeedSessions(whole.folder.path, whole.folder.nproc)
    with timed.writing():
        whole = whole.matching(timed)
    whole.folder.claim(whole.runs())
    missing = timed.unfinished(whole.sessions())
    if missing:
        echo("speed: run these where the models will train, one after the other", err=True)
        for session in missing:
            words = ["moepp", *timed.command(session), "--nproc", str(timed.nproc)]
            echo(f"  {shlex.join(words)}", err=True)
    return whole


def _write(whole: Pilot) -> bool:
    """Write results of whole seeds; False if there are none."""
    from moepp_megatron.runtime.atomic import write_atomic
    from moepp_megatron.workbench.experiments.pilot.collect import result_of
    from moepp_megatron.workbench.experiments.pilot.page import write_pilot_page

    result = result_of(whole)
    if result is None:
        return False
    path = whole.folder.path
    write_atomic(path / "pilot.json", (result.model_dump_json(indent=1) + "\n").encode())
    write_pilot_page(result, path / "pilot.html")
    return True


def _finish(whole: Pilot) -> None:
    from moepp_megatron.workbench.experiments.pilot.result import PilotResult
    from moepp_megatron.workbench.experiments.pilot.terminal import print_pilot

    path = whole.folder.path
    runs = whole.runs()
    missing = whole.folder.unfinished(runs)
    if missing:
        echo(
            f"{len(missing)} of {len(runs)} runs are missing; their configurations are in "
            f"{path / 'configs'}",
            err=True,
        )
    if not _write(whole):
        echo("no seed is finished by every model yet", err=True)
        return
    print_pilot(PilotResult.model_validate_json((path / "pilot.json").read_text()))
    echo(f"results      {path / 'pilot.json'}")
    echo(f"page         {path / 'pilot.html'}")


def _check_runs(settings: Config, runs: list[PilotRun], nproc: int, collect: bool) -> None:
    """Check every model, before the first run, for errors that would stop a run at its start."""
    from moepp_megatron.data.prepared_data import check_data
    from moepp_megatron.runtime.fit import check_fit

    by_arm = {run.arm.name: run for run in runs}
    for warning in check_config(settings):
        echo(f"warning: {warning}", err=True)
    if collect:
        return
    for run in by_arm.values():
        Layout.from_config(run.config, nproc)
        check_fit(run.config)
    for warning in check_data(settings):
        echo(f"warning: {warning}", err=True)
