"""`moepp pilot`: short paired runs of MoE++ and vanilla on the user's data; does MoE++ pay?"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moepp_megatron.cli.echo import echo
from moepp_megatron.cli.options import ConfigArgument, OverridesArgument
from moepp_megatron.config import Config, ConfigError, Layout, check_config, load_config

if TYPE_CHECKING:
    from moepp_megatron.workbench.experiments.pilot.collect import Pilot
    from moepp_megatron.workbench.experiments.pilot.extrapolate import TargetRequest
    from moepp_megatron.workbench.experiments.pilot.runs import PilotRun

_TARGET = "Extrapolate to"


def pilot(
    config: ConfigArgument,
    out: Annotated[
        Path,
        typer.Option(help="Folder of the pilot; a second call goes on with it.", metavar="DIR"),
    ],
    overrides: OverridesArgument = None,
    nproc: Annotated[int, typer.Option(min=1, help="Ranks of a run, on this machine.")] = 1,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of a run; by default training.train_iters.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=50, help="How many, from training.seed on.")] = 3,
    taus: Annotated[
        str | None,
        typer.Option(
            help="Weights of zero-computation experts; by default the configured one, 0.5 and 1.",
            metavar="TAU,...",
        ),
    ] = None,
    eval_iters: Annotated[
        int | None,
        typer.Option(
            min=1, help="Global batches of validation; by default as configured, at least 8."
        ),
    ] = None,
    collect: Annotated[
        bool,
        typer.Option(
            "--collect",
            help="Run nothing; write the configuration of every run, and results of what is there. "
            "For runs that are started elsewhere, such as by moepp slurm.",
        ),
    ] = False,
    target: Annotated[
        Path | None,
        typer.Option(
            help="Configuration of the model to decide about; by default CONFIG itself.",
            metavar="CONFIG",
            rich_help_panel=_TARGET,
        ),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Number of its GPUs.", rich_help_panel=_TARGET)
    ] = None,
    gpu: Annotated[str, typer.Option(help="As moepp plan.", rich_help_panel=_TARGET)] = "h100_sxm",
    price: Annotated[
        float | None,
        typer.Option(help="Price per GPU and hour, as for moepp plan.", rich_help_panel=_TARGET),
    ] = None,
    tokens: Annotated[
        float | None,
        typer.Option(
            help="To train on; by default all of its configured steps.", rich_help_panel=_TARGET
        ),
    ] = None,
) -> None:
    """Does MoE++ pay on your data and hardware? Short paired runs against vanilla say so.

    Vanilla, MoE++ at several tau, and vanilla with fewer experts per token (the fair baseline at
    equal speed) train on the same tokens with the same seeds. Writes DIR/pilot.json and
    DIR/pilot.html. Finished runs stay finished: a second call goes on.

    On several machines: --collect writes DIR/configs/*.yaml, each of which `moepp train` or `moepp
    slurm` takes; a later --collect reads what they have left in DIR/runs.
    """
    settings = load_config(config, overrides or [])
    request = _target(settings, config, target, gpus, gpu, price, tokens)
    from moepp_megatron.workbench.experiments.pilot.arms import build_arms
    from moepp_megatron.workbench.experiments.pilot.collect import Pilot
    from moepp_megatron.workbench.experiments.pilot.runs import PilotRuns

    arms = build_arms(
        settings, steps or settings.training.train_iters, _taus(settings, taus), eval_iters
    )
    first = settings.training.seed
    folder = PilotRuns(out.resolve(), nproc)
    numbers = list(range(first, first + seeds))
    runs = folder.all_of(arms, numbers)
    _check_runs(settings, runs, nproc, collect)
    if request is not None:
        request.check()
    folder.claim(runs)
    whole = Pilot(
        folder=folder,
        arms=arms,
        seeds=numbers,
        command=shlex.join(["moepp", *sys.argv[1:]]),
        target=request,
    )
    _run_and_write(whole, runs, collect)


def _run_and_write(whole: Pilot, runs: list[PilotRun], collect: bool) -> None:
    from moepp_megatron.workbench.experiments.runs import Interrupted, RunFailed

    try:
        _announce(whole, runs)
        if not collect:
            _run(whole, runs)
        _finish(whole, runs)
    except Interrupted as stop:
        from moepp_megatron.runtime.launch import STOPPED

        echo(str(stop), err=True)
        raise typer.Exit(STOPPED) from None
    except RunFailed as failure:
        echo(f"error: {failure}", err=True)
        raise typer.Exit(1) from None


def _announce(whole: Pilot, runs: list[PilotRun]) -> None:
    done = len(runs) - len(whole.folder.unfinished(runs))
    training = runs[0].config.training
    per_step = training.global_batch_size * runs[0].config.model.seq_length
    steps = whole.arms[0].arm.steps
    echo(
        f"{len(runs)} runs of {steps:,} steps ({steps * per_step:,} tokens): {len(whole.seeds)} "
        f"seeds of {len(whole.arms)} models" + (f"; {done} runs are there already" if done else "")
    )
    for arm in whole.arms:
        phi = arm.config.moe.ffn_share
        share = f", FFN share {phi:.0%} if balanced" if arm.arm.kind == "moepp" else ""
        echo(f"  {arm.arm.name}: top-{arm.arm.topk}{share}, {arm.arm.steps:,} steps")


def _run(whole: Pilot, runs: list[PilotRun]) -> None:
    """Do the missing runs; results are written after each seed."""
    from moepp_megatron.workbench.report.progress import progress

    def finished(run: PilotRun) -> None:
        same_seed = [one for one in runs if one.seed == run.seed]
        if run is not runs[-1] and not whole.folder.unfinished(same_seed):
            _write(whole)

    with progress(len(whole.folder.unfinished(runs))) as advance:
        whole.folder.run_missing(runs, advance, finished)


def _write(whole: Pilot) -> bool:
    """Write results of whole seeds; False if there are none."""
    from moepp_megatron.runtime.atomic import write_atomic
    from moepp_megatron.workbench.experiments.pilot.report import write_pilot_page

    result = whole.result()
    if result is None:
        return False
    path = whole.folder.path
    write_atomic(path / "pilot.json", (result.model_dump_json(indent=1) + "\n").encode())
    write_pilot_page(result, path / "pilot.html")
    return True


def _finish(whole: Pilot, runs: list[PilotRun]) -> None:
    from moepp_megatron.workbench.experiments.pilot.report import print_pilot
    from moepp_megatron.workbench.experiments.pilot.result import PilotResult

    path = whole.folder.path
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
        return sorted({configured_tau(config), 0.5, 1.0}, reverse=True)
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

    training = wanted.training
    per_step = training.global_batch_size * wanted.model.seq_length
    return TargetRequest(
        name=(target or config).stem,
        config=wanted,
        gpus=gpus,
        machine=machine_of(hardware),
        tokens=tokens or training.train_iters * per_step,
        price_per_hour=price or hardware.price_per_hour,
    )
