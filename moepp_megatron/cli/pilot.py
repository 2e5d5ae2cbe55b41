"""`moepp pilot`: short paired runs of MoE++ and vanilla on the user's data; does MoE++ pay?"""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moepp_megatron.cli.echo import echo, warn
from moepp_megatron.cli.options import ConfigArgument, OverridesArgument
from moepp_megatron.config import Layout, check_config, load_config
from moepp_megatron.config.exit_codes import FAILED

if TYPE_CHECKING:
    from moepp_megatron.tools.experiments.pilot.procedure import Pilot
    from moepp_megatron.tools.experiments.pilot.result import PilotResult


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
    slurm` takes; a later --collect reads what they wrote to DIR/runs.

    Examples:
        moepp pilot configs/quickstart.yaml --out pilots/mine --nproc 2 --steps 60
        moepp pilot configs/quickstart.yaml --out pilots/other moe.tau=0.5 --nproc 2 --steps 60
    """
    settings = load_config(config, overrides or [])
    from moepp_megatron.config.exit_codes import STOPPED
    from moepp_megatron.tools.experiments.pilot.arms import build_arms
    from moepp_megatron.tools.experiments.pilot.plan import PilotPlan
    from moepp_megatron.tools.experiments.pilot.procedure import Pilot
    from moepp_megatron.tools.experiments.pilot.trials import claim
    from moepp_megatron.tools.experiments.pilot.verdict import FEWEST_SEEDS
    from moepp_megatron.tools.experiments.runner import Interrupted, RunFailed

    first = settings.training.seed
    whole = Pilot(
        folder=out.resolve(),
        nproc=nproc,
        config=settings,
        base=build_arms(settings, steps or settings.training.train_iters, eval_iters),
        seeds=range(first, first + seeds),
        plan=PilotPlan(first=max(seeds, FEWEST_SEEDS), sessions=sessions),
        command=shlex.join(["moepp", *sys.argv[1:]]),
        eval_iters=eval_iters,
    )
    _check_runs(whole, collect)
    claim(whole.folder, whole.runs)
    whole = replace(whole, plan=PilotPlan.claim(whole.folder, whole.plan))
    try:
        _announce(whole)
        _finish(_collected(whole) if collect else _run(whole))
    except Interrupted as stop:
        echo(str(stop), err=True)
        raise typer.Exit(STOPPED) from None
    except RunFailed as failure:
        echo(f"error: {failure}", err=True)
        raise typer.Exit(FAILED) from None


def _announce(whole: Pilot) -> None:
    from moepp_megatron.tools.experiments.runner import missing

    runs = whole.runs[: len(whole.base) * len(whole.seeds)]
    done = len(runs) - len(missing(runs))
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
    from moepp_megatron.tools.experiments.runner import missing
    from moepp_megatron.tools.report.progress import progress

    left = len(missing(whole.runs))
    if not whole.matched:
        left += whole.plan.sessions + 2 * len(whole.seeds)
    with progress(left) as advance:
        return whole.run(advance, _write)


def _collected(whole: Pilot) -> Pilot:
    """Write what can be run now, and say how to time MoE++ where that comes next."""
    from moepp_megatron.tools.experiments.pilot.trials import claim
    from moepp_megatron.tools.experiments.runner import missing

    whole = whole.matching()
    claim(whole.folder, whole.runs)
    sessions = missing(whole.sessions())
    if sessions:
        echo("speed: run these where the models will train, one after the other", err=True)
    for session in sessions:
        words = ["moepp", *session.command, "--nproc", str(session.nproc)]
        echo(f"  {shlex.join(words)}", err=True)
    return whole


def _write(whole: Pilot) -> PilotResult | None:
    """Write results of whole seeds; None if there are none."""
    from moepp_megatron.runtime.atomic import write_atomic
    from moepp_megatron.tools.experiments.pilot.collect import result_of
    from moepp_megatron.tools.experiments.pilot.page import write_pilot_page

    result = result_of(whole)
    if result is not None:
        content = result.model_dump_json(indent=1) + "\n"
        write_atomic(whole.folder / "pilot.json", content.encode())
        write_pilot_page(result, whole.folder / "pilot.html")
    return result


def _finish(whole: Pilot) -> None:
    from moepp_megatron.tools.experiments.pilot.page import print_pilot
    from moepp_megatron.tools.experiments.runner import missing

    runs = whole.runs
    left = missing(runs)
    if left:
        echo(
            f"{len(left)} of {len(runs)} runs are missing; their configurations are in "
            f"{whole.folder / 'configs'}",
            err=True,
        )
    result = _write(whole)
    if result is None:
        echo("no seed is finished by every model yet", err=True)
        return
    print_pilot(result)
    echo(f"results      {whole.folder / 'pilot.json'}")
    echo(f"page         {whole.folder / 'pilot.html'}")


def _check_runs(whole: Pilot, collect: bool) -> None:
    """Check every model, before the first run, for errors that would stop a run at its start."""
    from moepp_megatron.data.prepared_data import check_data
    from moepp_megatron.runtime.fit import check_fit

    warn(*check_config(whole.config))
    if collect:
        return
    for arm in whole.base:
        Layout.from_config(arm.config, whole.nproc)
        check_fit(arm.config)
    warn(*check_data(whole.config))
