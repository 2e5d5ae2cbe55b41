"""`moepp scale`: strong and weak scaling of MoE++ and its vanilla baseline, one job per point."""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moepp_megatron.cli.echo import echo, warn
from moepp_megatron.cli.options import (
    ConfigArgument,
    NnodesOption,
    NodeRankOption,
    OverridesArgument,
    RdzvEndpointOption,
    RdzvIdOption,
)
from moepp_megatron.cli.ranks import machines
from moepp_megatron.config import Config, ConfigError, check_config, load_config
from moepp_megatron.config.exit_codes import FAILED

if TYPE_CHECKING:
    from moepp_megatron.runtime.nodes import Nodes
    from moepp_megatron.tools.experiments.scaling.grid import ScalingGrid
    from moepp_megatron.tools.experiments.scaling.trials import Measuring, PointTrial


def scale(
    config: ConfigArgument,
    out: Annotated[
        Path,
        typer.Option(
            help="Write the test to this folder; a second call continues it.", metavar="DIR"
        ),
    ],
    overrides: OverridesArgument = None,
    nproc: Annotated[
        str,
        typer.Option(
            help="Measure on these numbers of ranks, counted over all machines.", metavar="N,..."
        ),
    ] = "1,2,4",
    mode: Annotated[
        str,
        typer.Option(
            help="Measure these kinds of scaling: strong, where the global batch stays, and weak, "
            "where it grows with the ranks.",
            metavar="MODE,...",
        ),
    ] = "strong,weak",
    layout: Annotated[
        list[str] | None,
        typer.Option(
            help="Use these degrees of parallelism, such as ep=2,tp=1 (tp, pp, cp, ep, etp; the "
            "others are as in CONFIG), or auto, the default: the largest expert parallelism that "
            "divides experts and ranks. Give the option several times to compare several.",
            metavar="SPEC",
        ),
    ] = None,
    kinds: Annotated[
        str,
        typer.Option(
            help="Measure these models. Two are in memory at once; a single one needs half of it.",
            metavar="KIND,...",
        ),
    ] = "moepp,vanilla",
    repeats: Annotated[
        int,
        typer.Option(
            min=1, help="Repeat this many times; the models take turns, and medians count."
        ),
    ] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Time this many steps per repetition.")] = 3,
    warmup: Annotated[
        int, typer.Option(min=1, help="Run this many steps of each model before timing starts.")
    ] = 3,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Print the points that are still to be measured, a name and a number of ranks per "
            "line, and stop. This and what follows is for batch scripts.",
        ),
    ] = False,
    point: Annotated[
        str | None, typer.Option(help="Measure only the point of this name.", metavar="NAME")
    ] = None,
    collect: Annotated[
        bool,
        typer.Option(
            "--collect",
            help="Measure nothing; write scale.json and scaling.html of the points that are there.",
        ),
    ] = False,
    nnodes: NnodesOption = 1,
    node_rank: NodeRankOption = None,
    rdzv_endpoint: RdzvEndpointOption = None,
    rdzv_id: RdzvIdOption = "moepp",
) -> None:
    """Measure how MoE++ and vanilla scale over ranks: step time, tokens/s, efficiency, all-to-all.

    Every point is a job of its own. Finished points stay finished: a second call measures what is
    missing or has failed. Routing is held at the balanced share phi and tokens are random, so
    nothing depends on training.

    Examples:
        moepp scale configs/quickstart.yaml --out scaling --nproc 1,2
        moepp scale configs/quickstart.yaml --out scaling --nproc 2 --layout ep=2
    """
    from moepp_megatron.config.choices import parse_choices, parse_counts
    from moepp_megatron.config.vanilla import refuse_vanilla
    from moepp_megatron.runtime.rank import RankEnvironment
    from moepp_megatron.tools.experiments.runner import Interrupted, missing
    from moepp_megatron.tools.experiments.scaling.grid import KINDS, MODES, build_grid
    from moepp_megatron.tools.experiments.scaling.trials import Measuring, PointTrial, claim

    modes = parse_choices("--mode", mode, MODES)
    chosen = parse_choices("--kinds", kinds, KINDS)
    nprocs = parse_counts("--nproc", nproc)
    nodes = machines(nnodes, node_rank, rdzv_endpoint, rdzv_id)
    if nodes is not None and point is None:
        raise ConfigError(
            f"--nnodes ({nnodes}) must come with --point, since machines meet for one point; name "
            "one that --plan prints"
        )
    rank = RankEnvironment.read() if nodes is None else RankEnvironment()
    settings = load_config(config, overrides or [])
    refuse_vanilla(settings)
    grid = build_grid(settings, nprocs, layout or ["auto"], modes)
    from moepp_megatron.runtime.fit import check_fit

    check_fit(settings)
    measuring = Measuring(tuple(chosen), warmup, steps, repeats)
    command = ["scale", str(config), *(overrides or []), "--out", str(out), "--nproc", nproc]
    command += ["--mode", mode, "--kinds", kinds, "--repeats", str(repeats)]
    command += ["--steps", str(steps), "--warmup", str(warmup)]
    command += [word for spec in layout or [] for word in ("--layout", spec)]
    if rank.rank == 0:
        claim(out, settings, measuring)
    trials = [PointTrial.of(out, each, command) for each in grid.points]
    if rank.is_launched:
        chosen_point = grid.point_of_ranks(point, rank.world_size)
        _measure_on_rank(settings, trials[grid.points.index(chosen_point)], measuring)
        return
    if plan:
        for each in missing(trials):
            echo(f"{each.name} {each.nproc}")
        return
    failed = False
    try:
        if point is not None:
            _run_one(trials[grid.points.index(grid.named(point))], nodes)
            return
        if not collect:
            failed = _run_all(settings, grid, trials)
    except Interrupted as stop:
        echo(str(stop), err=True)
        raise typer.Exit(stop.status) from None
    _collect(settings, grid, measuring, trials)
    if failed:
        raise typer.Exit(FAILED)


def _run_one(trial: PointTrial, nodes: Nodes | None) -> None:
    """Measure one point on this machine and the others that do the same."""
    from moepp_megatron.tools.experiments.runner import run_trial

    reason = run_trial(trial, nodes)
    if reason is not None:
        echo(f"failed: {trial.name}: {reason}", err=True)
        raise typer.Exit(FAILED)


def _run_all(config: Config, grid: ScalingGrid, trials: list[PointTrial]) -> bool:
    """Measure everything that is missing, on this machine; returns whether a point failed."""
    from moepp_megatron.tools.experiments.runner import missing, run_missing
    from moepp_megatron.tools.report.progress import progress

    warn(*check_config(config))
    for what, reason in grid.impossible.items():
        echo(f"left out: {what}: {reason}", err=True)
    total, todo = len(trials), len(missing(trials))
    if todo < total:
        echo(f"{total - todo} of {total} points are there already", err=True)
    with progress(todo) as advance:
        failures = run_missing(trials, advance)
    for name, reason in failures.items():
        echo(f"failed: {name}: {reason}", err=True)
    if failures:
        echo(f"{len(failures)} of {total} points failed; run again to retry them", err=True)
    return bool(failures)


def _measure_on_rank(config: Config, trial: PointTrial, measuring: Measuring) -> None:
    """Be one rank of one point; rank 0 writes the result."""
    from moepp_megatron.runtime.optional import quiet
    from moepp_megatron.runtime.rank import RankEnvironment
    from moepp_megatron.runtime.stop_signals import die_with_parent

    quiet()
    die_with_parent(os.getppid())
    rank = RankEnvironment.read()
    try:
        from moepp_megatron.tools.experiments.scaling.measure import measure_on_rank

        measure_on_rank(config, trial, measuring, rank)
    except Exception as error:
        from moepp_megatron.tools.experiments.runner import FAILURE_MARK

        traceback.print_exc()
        first_line = (str(error).splitlines() or [""])[0]
        echo(f"{FAILURE_MARK} {rank.rank}: {type(error).__name__}: {first_line}", err=True)
        raise typer.Exit(FAILED) from None


def _collect(
    config: Config, grid: ScalingGrid, measuring: Measuring, trials: list[PointTrial]
) -> None:
    from moepp_megatron.tools.experiments.scaling.page import build_scaling_page, print_records
    from moepp_megatron.tools.experiments.scaling.records import scale_records, write_records

    files = [(trial, trial.read()) for trial in trials]
    records = scale_records({t.point: f.result for t, f in files if f and f.result})
    if not records:
        echo("no point is measured yet", err=True)
        return
    gaps = {
        trial.name: f"failed: {file.error}" if file else "not measured yet"
        for trial, file in files
        if file is None or file.result is None
    }
    gaps |= {what: f"does not fit: {reason}" for what, reason in grid.impossible.items()}
    print_records(records)
    out = trials[0].folder
    results = write_records(out / "scale.json", records)
    page = build_scaling_page(out / "scaling.html", config, measuring, records, gaps)
    echo(f"results      {results}")
    echo(f"page         {page}")
