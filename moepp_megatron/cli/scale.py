"""`moepp scale`: strong and weak scaling of MoE++ and its vanilla baseline, one job per point."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

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
from moepp_megatron.config import ConfigError, check_config, load_config
from moepp_megatron.config.exit_codes import FAILED

if TYPE_CHECKING:
    from moepp_megatron.tools.experiments.runner import RunFailed
    from moepp_megatron.tools.experiments.scaling.points import Point
    from moepp_megatron.tools.experiments.timed_step import TimedStepTrial


def scale(
    config: ConfigArgument,
    out: Annotated[
        Path,
        Option(help="Write the test to this folder; a second call continues it.", metavar="DIR"),
    ],
    overrides: OverridesArgument = None,
    nproc: Annotated[
        str,
        Option(
            help="Measure on these numbers of ranks, counted over all machines.", metavar="N,..."
        ),
    ] = "1,2,4",
    mode: Annotated[
        str,
        Option(
            help="Measure these kinds of scaling: strong, where the global batch stays, and weak, "
            "where it grows with the ranks.",
            metavar="MODE,...",
        ),
    ] = "strong,weak",
    layout: Annotated[
        list[str] | None,
        Option(
            help="Use these degrees of parallelism, such as ep=2,tp=1 (tp, pp, cp, ep, etp; the "
            "others are as in CONFIG), or auto, the default: the largest expert parallelism that "
            "divides experts and ranks. Give the option several times to compare several.",
            metavar="SPEC",
        ),
    ] = None,
    rounds: Annotated[
        int, Option(min=1, help="Time this many steps per model; the models take turns.")
    ] = 20,
    plan: Annotated[
        bool,
        Option(
            "--plan",
            help="Print the points that are still to be measured, a name and a number of ranks per "
            "line, and stop. This and what follows is for batch scripts.",
        ),
    ] = False,
    point: Annotated[
        str | None, Option(help="Measure only the point of this name.", metavar="NAME")
    ] = None,
    collect: Annotated[
        bool,
        Option(
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
    from moepp_megatron.tools.experiments.runner import (
        Interrupted,
        RunFailed,
        claim,
        missing,
        run_trial,
    )
    from moepp_megatron.tools.experiments.scaling.points import MODES, build_points, shared_settings

    modes = parse_choices("--mode", mode, MODES)
    nprocs = parse_counts("--nproc", nproc)
    nodes = machines(nnodes, node_rank, rdzv_endpoint, rdzv_id)
    if nodes is not None and point is None:
        raise ConfigError(
            f"--nnodes ({nnodes}) must come with --point, since machines meet for one point; name "
            "one that --plan prints"
        )
    started = RankEnvironment.read().world_size
    if started > 1 and nodes is None:
        raise ConfigError(
            f"moepp scale must start its ranks itself, and is one of {started}; start it once on "
            "each machine, with --nnodes and --rdzv-endpoint"
        )
    settings = load_config(config, overrides or [])
    refuse_vanilla(settings)
    points, impossible = build_points(settings, nprocs, layout or ["auto"], modes)
    if point is not None and point not in points:
        raise ConfigError(f"--point ({point}) must be one of {', '.join(points)}")
    from moepp_megatron.runtime.fit import check_fit

    check_fit(settings)
    claim(out, shared_settings(settings, rounds), ("points", "logs"))
    words = [str(config), *(overrides or [])]
    trials = {name: each.trial(out, words, rounds) for name, each in points.items()}
    if plan:
        for trial in missing([*trials.values()]):
            echo(f"{trial.name} {trial.nproc}")
        return
    failures: list[RunFailed] = []
    try:
        if point is not None:
            run_trial(trials[point], nodes)
            return
        if not collect:
            warn(*check_config(settings))
            failures = _run_all([*trials.values()], impossible)
    except Interrupted as stop:
        echo(str(stop), err=True)
        raise typer.Exit(stop.status) from None
    except RunFailed as failure:
        echo(str(failure), err=True)
        raise typer.Exit(FAILED) from None
    _collect(out, settings.run.name, {points[name]: trial for name, trial in trials.items()})
    if failures:
        raise typer.Exit(FAILED)


def _run_all(trials: list[TimedStepTrial], impossible: dict[str, str]) -> list[RunFailed]:
    """Measure everything that is missing, on this machine; return what has failed."""
    from moepp_megatron.tools.experiments.runner import missing, run_missing
    from moepp_megatron.tools.report.terminal import progress

    for what, reason in impossible.items():
        echo(f"left out: {what}: {reason}", err=True)
    total, todo = len(trials), len(missing(trials))
    if todo < total:
        echo(f"{total - todo} of {total} points are there already", err=True)
    failures: list[RunFailed] = []
    with progress(todo) as advance:
        run_missing(trials, advance, failures)
    for failure in failures:
        echo(str(failure), err=True)
    if failures:
        echo(f"{len(failures)} of {total} points failed; run again to retry them", err=True)
    return failures


def _collect(out: Path, name: str, trials: dict[Point, TimedStepTrial]) -> None:
    """Write and print what was measured."""
    from moepp_megatron.runtime.atomic import write_json
    from moepp_megatron.tools.experiments.scaling import page

    results = {point: trial.result() for point, trial in trials.items()}
    records = page.scale_records({point: both for point, both in results.items() if both})
    if not records:
        echo("no point is measured yet", err=True)
        return
    page.print_records(records)
    write_json(out / "scale.json", [asdict(record) for record in records])
    missing = [point.name for point, both in results.items() if both is None]
    page.write_scaling_page(out / "scaling.html", name, records, missing)
    echo(f"results      {out / 'scale.json'}")
    echo(f"page         {out / 'scaling.html'}")
