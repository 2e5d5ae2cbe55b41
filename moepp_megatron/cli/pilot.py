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
    GpuOption,
    OverridesArgument,
    PriceOption,
    TokensOption,
)
from moepp_megatron.cli.planned import planned_samples
from moepp_megatron.config import Config, ConfigError, Layout, check_config, load_config

if TYPE_CHECKING:
    from moepp_megatron.workbench.experiments.pilot.extrapolate import TargetRequest
    from moepp_megatron.workbench.experiments.pilot.procedure import Pilot
    from moepp_megatron.workbench.experiments.pilot.runs import PilotRun


def pilot(
    config: ConfigArgument,
    out: Annotated[
        Path,
        typer.Option(
            help="Write the pilot to this folder; a second call goes on with it.", metavar="DIR"
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
    taus: Annotated[
        str | None,
        typer.Option(
            help="Train MoE++ with these values of moe.tau; by default, with the configured one. "
            "Each further value makes a decision harder.",
            metavar="TAU,...",
        ),
    ] = None,
    sessions: Annotated[
        int,
        typer.Option(min=2, max=50, help="Time MoE++ beside vanilla in this many sessions."),
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
    target: Annotated[
        Path | None,
        typer.Option(
            help="With --gpus, decide about the model of this configuration; by default, about "
            "that of CONFIG.",
            metavar="CONFIG",
        ),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(min=1, help="Extrapolate to a training run on this many GPUs."),
    ] = None,
    gpu: GpuOption = "h100_sxm",
    price: PriceOption = None,
    tokens: TokensOption = None,
) -> None:
    """Find out in short paired runs against vanilla whether MoE++ pays on your data and hardware.

    Vanilla, MoE++, MoE++ for vanilla's time, vanilla narrowed to MoE++'s compute, and MoE++ with
    more selections at vanilla's compute train with the same seeds; speed is timed in sessions of
    its own. DIR/pilot.json and DIR/pilot.html have the results. Finished runs stay finished: a
    second call goes on.

    On several machines, --collect writes DIR/configs/*.yaml, each of which `moepp train` or `moepp
    slurm` takes; a later --collect reads what they have left in DIR/runs.

    Examples:
        moepp pilot configs/quickstart.yaml --out pilots/mine --nproc 2 --steps 60
        moepp pilot configs/quickstart.yaml --out pilots/mine --nproc 2 --gpus 64
    """
    settings = load_config(config, overrides or [])
    request = _target(settings, config, target, gpus, gpu, price, tokens)
    from moepp_megatron.workbench.experiments.pilot.arms import build_arms
    from moepp_megatron.workbench.experiments.pilot.plan import Plan
    from moepp_megatron.workbench.experiments.pilot.procedure import Pilot
    from moepp_megatron.workbench.experiments.pilot.runs import PilotRuns
    from moepp_megatron.workbench.experiments.pilot.schedule import FEWEST_SEEDS

    arms = build_arms(
        settings, steps or settings.training.train_iters, _taus(settings, taus), eval_iters
    )
    first = settings.training.seed
    folder = PilotRuns(out.resolve(), nproc)
    numbers = list(range(first, first + seeds))
    _check_runs(settings, folder.all_of(arms, numbers), nproc, collect)
    if request is not None:
        request.check()
    folder.claim(folder.all_of(arms, numbers))
    names = [arm.arm.name for arm in arms if arm.arm.kind == "moepp"]
    first_look = max(seeds, FEWEST_SEEDS)
    whole = Pilot(
        folder=folder,
        config=settings,
        base=arms,
        seeds=numbers,
        plan=Plan.claim(folder.path, Plan(first=first_look, arms=names, sessions=sessions)),
        command=shlex.join(["moepp", *sys.argv[1:]]),
        eval_iters=eval_iters,
        target=request,
    )
    folder.claim(whole.runs())
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
        share = "" if arm.arm.tau is None else f", FFN share {phi:.0%} if balanced"
        echo(f"  {arm.arm.name}: top-{arm.arm.topk}{share}, {arm.arm.steps:,} steps")
    echo(
        f"then {whole.plan.sessions} sessions of speed, and for each MoE++ arm it for vanilla's "
        f"time and vanilla in its compute; decided after every {whole.plan.first} seeds"
    )


def _run(whole: Pilot) -> Pilot:
    """Do what is missing; results are written after each seed of the last stage."""
    from moepp_megatron.workbench.report.progress import progress

    runs, sessions = whole.folder.unfinished(whole.runs()), whole.num_sessions
    matched = 0 if whole.matched else 2 * len(whole.moepp) * len(whole.seeds)
    with progress(len(runs) + sessions + matched) as advance:
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
    from moepp_megatron.workbench.experiments.pilot.report import write_pilot_page

    result = result_of(whole)
    if result is None:
        return False
    path = whole.folder.path
    write_atomic(path / "pilot.json", (result.model_dump_json(indent=1) + "\n").encode())
    write_pilot_page(result, path / "pilot.html")
    return True


def _finish(whole: Pilot) -> None:
    from moepp_megatron.workbench.experiments.pilot.report import print_pilot
    from moepp_megatron.workbench.experiments.pilot.result import PilotResult

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


def _taus(config: Config, text: str | None) -> list[float]:
    from moepp_megatron.config.choices import parse_numbers
    from moepp_megatron.workbench.experiments.pilot.arms import configured_tau

    if text is None:
        return [configured_tau(config)]
    return sorted(
        parse_numbers("--taus", text, "a number > 0 and up to 10", lambda tau: 0 < tau <= 10),
        reverse=True,
    )


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


def _target(
    settings: Config,
    config: Path,
    target: Path | None,
    gpus: int | None,
    gpu: str,
    price: float | None,
    tokens: float | None,
) -> TargetRequest | None:
    """The target of the extrapolation; None if no GPUs are named."""
    from moepp_megatron.config.hardware import load_hardware, nearest_hardware

    given = {"--target": target, "--price": price, "--tokens": tokens}
    for name, value in given.items():
        if value is not None and gpus is None:
            raise ConfigError(f"{name} ({value}) must come with --gpus; say how many GPUs")
        if isinstance(value, float) and not 0 < value < float("inf"):
            raise ConfigError(f"{name} ({value:g}) must be a number above 0; use for example 2.5")
    if gpus is None:
        return None
    wanted = settings if target is None else load_config(target)
    hardware = load_hardware(nearest_hardware(gpu))
    from moepp_megatron.workbench.experiments.pilot.extrapolate import TargetRequest
    from moepp_megatron.workbench.planning.machine import machine_of

    return TargetRequest(
        name=(target or config).stem,
        config=wanted,
        gpus=gpus,
        machine=machine_of(hardware),
        tokens=tokens or planned_samples(wanted) * wanted.model.seq_length,
        price_per_hour=price or hardware.price_per_hour,
    )
