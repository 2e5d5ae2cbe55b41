"""`moepp train`: trains a model; with several ranks it starts torchrun itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from moepp_megatron.cli.echo import echo, warn
from moepp_megatron.cli.options import (
    GPU_NAMES,
    ConfigArgument,
    NnodesOption,
    NodeRankOption,
    NprocOption,
    OverridesArgument,
    RdzvEndpointOption,
    RdzvIdOption,
)
from moepp_megatron.cli.ranks import machines, refusing_for_all
from moepp_megatron.cli.run_end import is_given, resume_command
from moepp_megatron.config import ConfigError

if TYPE_CHECKING:
    from moepp_megatron.runtime.launch import LaunchOptions
    from moepp_megatron.training.train_request import TrainRequest


def train(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    nproc: NprocOption = 1,
    max_restarts: Annotated[
        int,
        Option(
            min=0,
            help="Restart all ranks up to this many times after one has died; they continue from "
            "the newest checkpoint.",
        ),
    ] = 0,
    resume: Annotated[
        bool,
        Option(
            "--resume",
            help="Continue from this run's newest checkpoint; if it has none, start as "
            "checkpoint.load says.",
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        Option(
            "--overwrite",
            help="Start from scratch where run.dir holds a run, which is moved to a folder next "
            "to it, named by date and time. Nothing is deleted.",
        ),
    ] = False,
    log_dir: Annotated[
        Path | None,
        Option(
            help="Also write the output of each rank of this machine to a file in this folder.",
            metavar="DIR",
        ),
    ] = None,
    nnodes: NnodesOption = 1,
    node_rank: NodeRankOption = None,
    rdzv_endpoint: RdzvEndpointOption = None,
    rdzv_id: RdzvIdOption = "moepp",
    restart_timeout: Annotated[
        int | None,
        Option(
            min=1,
            help="Wait this long for the other machines after a failure (120 by default), then end "
            "with exit status 71.",
            metavar="SECONDS",
        ),
    ] = None,
    ignore_memory: Annotated[
        bool,
        Option(
            "--ignore-memory",
            help="Start even if the estimate of its memory does not fit the GPU here.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        Option(
            "--dry-run",
            help="Check the configuration, print the rank grid, parameters and memory, and stop.",
        ),
    ] = False,
    gpu: Annotated[
        str | None,
        Option(
            help=f"With --dry-run, compare the memory with that of this GPU: {GPU_NAMES}; cpu is "
            "this machine's CPU. By default, it is telemetry.hardware, the GPU here, or an H100 "
            "where precision.dtype is bf16.",
            metavar="NAME",
        ),
    ] = None,
) -> None:
    """Train the model that CONFIG describes.

    Examples:
        moepp train configs/quickstart.yaml --nproc 2
        moepp train configs/quickstart.yaml moe.tau=0.5 run.dir=runs/low_tau --nproc 2
    """
    # Nothing here imports torch: that would cost seconds before an error shows.
    from moepp_megatron.runtime.launch import LaunchOptions, has_launcher
    from moepp_megatron.runtime.stop_signals import INTERRUPTED
    from moepp_megatron.runtime.terminal import lasting_output
    from moepp_megatron.training.run_folder import Start
    from moepp_megatron.training.train_request import TrainRequest

    nodes = machines(nnodes, node_rank, rdzv_endpoint, rdzv_id, restart_timeout)
    options = LaunchOptions(nproc, nodes, max_restarts, log_dir, stoppable=True)
    words = [str(config), *(overrides or []), *_words(options)]
    words += ["--ignore-memory"] if ignore_memory else []
    start = Start(resume=resume, overwrite=overwrite, resume_command=resume_command(words))
    with refusing_for_all(None if dry_run else nodes):
        request = TrainRequest.read(config, overrides or [], options, start, warn)
        if gpu is not None and not dry_run:
            raise ConfigError(f"--gpu ({gpu}) must come with --dry-run; add --dry-run")
        if dry_run:
            from moepp_megatron.cli.dry_run import print_plan
            from moepp_megatron.cli.path_problems import path_problems

            print_plan(request.config, request.layout, gpu)
            problems, warnings = path_problems(request.config)
            warn(*(f"a start here would be refused: {each}" for each in problems), *warnings)
            return
        if not ignore_memory and not has_launcher():
            from moepp_megatron.cli.memory_fit import refuse_too_large

            refuse_too_large(request.config, request.layout)
        request = request.admitted(warn)
        # A script's command is for all machines; without one each has its own.
        prints_command = not is_given() or nodes is None or not nodes.rank
        try:
            with lasting_output():
                _run(request, prints_command)
        except KeyboardInterrupt:
            echo("interrupted before training or after its end", err=True)
            raise typer.Exit(INTERRUPTED) from None


def _run(request: TrainRequest, prints_command: bool) -> None:
    from moepp_megatron.cli.run_end import print_end
    from moepp_megatron.runtime.launch import leave
    from moepp_megatron.training.checkpoint.find import NoStartError
    from moepp_megatron.training.run import RanksFailedError, run

    try:
        result = run(request, echo)
    except RanksFailedError as error:
        raise typer.Exit(error.status) from None
    except NoStartError as error:
        # All ranks have found that they cannot start: torchrun has nothing to report.
        if request.rank.local_rank == 0:
            echo(f"error: {error}", err=True)
        leave(error.exit_code, str(error))
    else:
        print_end(request, result, prints_command)


def _words(options: LaunchOptions) -> list[str]:
    """The options of this call without --resume and --overwrite."""
    words = []
    if options.num_local_ranks > 1:
        words += ["--nproc", str(options.num_local_ranks)]
    if options.max_restarts > 0:
        words += ["--max-restarts", str(options.max_restarts)]
    if options.log_dir is not None:
        words += ["--log-dir", str(options.log_dir)]
    return words if options.nodes is None else [*words, *options.nodes.moepp_options()]
