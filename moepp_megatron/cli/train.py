"""`moepp train`: trains a model; with several ranks it starts torchrun itself."""

from __future__ import annotations

import contextlib
import os
import shlex
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moepp_megatron.cli.echo import echo
from moepp_megatron.cli.go_on import GO_ON, go_on_command, is_given, say_go_on
from moepp_megatron.cli.machines import machines
from moepp_megatron.cli.prepared_data import check_data
from moepp_megatron.config import (
    Config,
    ConfigError,
    Layout,
    UnfitError,
    check_config,
    check_world_size,
    load_config,
    with_overrides,
)

if TYPE_CHECKING:
    from moepp_megatron.observe.metrics import StepMetrics
    from moepp_megatron.runtime.launch import LaunchOptions
    from moepp_megatron.runtime.nodes import Nodes
    from moepp_megatron.training.occupancy import Start


def train(
    config: Annotated[Path, typer.Argument(help="YAML configuration.", metavar="CONFIG")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change.", metavar="section.key=value")
    ] = None,
    nproc: Annotated[
        int, typer.Option(min=1, help="Ranks to start on this machine (not under torchrun).")
    ] = 1,
    max_restarts: Annotated[
        int,
        typer.Option(
            min=0,
            help="Start all ranks anew this often after one has died; they go on from the newest "
            "checkpoint.",
        ),
    ] = 0,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from this run's newest checkpoint if it has one, else start as "
            "checkpoint.load says.",
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Start anew where run.dir holds a run: that one is moved to a folder beside it, "
            "named by date and time. Nothing is deleted.",
        ),
    ] = False,
    log_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of this machine for the output of each rank, shown as well."),
    ] = None,
    nnodes: Annotated[int, typer.Option(min=1, help="Machines; run this on each of them.")] = 1,
    node_rank: Annotated[
        int | None,
        typer.Option(min=0, help="This machine among them, from 0; by default torchrun decides."),
    ] = None,
    rdzv_endpoint: Annotated[
        str | None,
        typer.Option(help="Where the machines meet: machine 0's address.", metavar="HOST[:PORT]"),
    ] = None,
    rdzv_id: Annotated[
        str, typer.Option(help="A name for this start of the run, the same on all machines.")
    ] = "moepp",
    restart_timeout: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Seconds that machines wait for each other after a failure (120 by default); "
            "then they end with status 71.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Validate, print rank grid and parameters, stop.")
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="With --dry-run: the card whose memory is compared, a name in configs/hardware or "
            "a YAML file; cpu for this machine's CPU. By default telemetry.hardware, the card "
            "here, or an H100 where precision.dtype is bf16.",
            metavar="NAME",
        ),
    ] = None,
    build_rank: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="With --dry-run: build this rank here, without its peers or its memory, and "
            "compare groups, shapes, parameters and memory with what is printed.",
            metavar="RANK",
        ),
    ] = None,
) -> None:
    """Train the model that CONFIG describes."""
    # Read from the environment only: asking torch would cost seconds before an error shows.
    from moepp_megatron.runtime.rank import RankEnvironment

    nodes = machines(nnodes, node_rank, rdzv_endpoint, rdzv_id, restart_timeout)
    # Told to be a launcher it is none of srun's ranks, though srun may have started several.
    rank = RankEnvironment.read() if nodes is None else RankEnvironment()
    settings = load_config(config, overrides or [])
    world_size = rank.world_size if rank.is_launched else nnodes * nproc
    layout = Layout.from_config(settings, world_size)
    # Each machine's launcher finds the same; one of them says it.
    if rank.rank == 0 and not node_rank:
        for warning in check_config(settings) + check_world_size(settings, world_size):
            echo(f"warning: {warning}", err=True)
    _check_build_rank(build_rank, dry_run, world_size)
    if gpu is not None and not dry_run:
        raise ConfigError(f"--gpu ({gpu}) must come with --dry-run; add --dry-run")
    if dry_run:
        from moepp_megatron.cli.dry_run import build_and_check, print_plan

        print_plan(settings, layout, gpu)
        if build_rank is not None and not build_and_check(settings, layout, build_rank):
            raise typer.Exit(1)
        return
    from moepp_megatron.runtime.launch import LaunchOptions
    from moepp_megatron.runtime.stop_signals import INTERRUPTED
    from moepp_megatron.training import occupancy

    name = rdzv_id if nodes is not None else rank.start_name
    restarted = rank.restart_count > 0 or occupancy.is_requeued(settings, name)
    overwrite = overwrite and not restarted
    resume = resume or restarted or (_goes_on_by_itself(settings) and not overwrite)
    words = _words(config, overrides, nproc, max_restarts, log_dir, nodes)
    start = occupancy.Start(
        resume=resume,
        overwrite=overwrite,
        restarted=restarted,
        name=name,
        config_file=config,
        go_on=go_on_command(words),
    )
    leads = rank.rank == 0 if nodes is None else node_rank == 0
    if leads and not occupancy.is_claimed():
        # At once; looking for packages imports torch.
        occupancy.refuse_occupied(settings, start)
    from moepp_megatron.runtime.fit import check_fit
    from moepp_megatron.runtime.launch import has_launcher

    check_fit(settings)
    if settings.telemetry.hardware is not None:
        from moepp_megatron.config.hardware import load_hardware

        load_hardware(settings.telemetry.hardware)
    if rank.rank == 0 and not node_rank:
        _check_sinks(settings)
    warnings = check_data(settings, whole_index=rank.rank == 0)
    if rank.rank == 0 and not node_rank and not has_launcher():
        for warning in warnings:
            echo(f"warning: {warning}", err=True)
    if resume:
        settings = _resumed(settings)
    if not (overwrite and settings.checkpoint.load == "auto"):
        _check_start(settings)
    alone = nproc == 1 and max_restarts == 0 and nodes is None and log_dir is None
    try:
        with _entering(settings, start, leads):
            if rank.is_launched or alone:
                _train_rank(settings, layout)
            else:
                options = LaunchOptions(nproc, nodes, max_restarts, log_dir, stoppable=True)
                _launch(options, start, not leads, [str(config), *(overrides or [])])
    except KeyboardInterrupt:
        echo("interrupted before training or after its end", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _goes_on_by_itself(config: Config) -> bool:
    """Whether the configuration asks for what --resume does."""
    return config.checkpoint.load == "auto" and config.checkpoint.load_optimizer


def _entering(config: Config, start: Start, leads: bool) -> AbstractContextManager[None]:
    """A context in which this process owns the run's folder, if it decides that for all ranks.

    Raises:
        ConfigError: If the run may not start there.
    """
    from moepp_megatron.training import occupancy

    if occupancy.is_claimed():
        return contextlib.nullcontext()
    if leads:
        return occupancy.claimed(config, start, echo)
    occupancy.check_beside_leader(config, start)
    return contextlib.nullcontext()


def _launch(options: LaunchOptions, start: Start, ranks_decide: bool, words: list[str]) -> None:
    """Start this machine's ranks, which decide if this machine is not known to be the first."""
    from moepp_megatron.runtime.launch import STOPPED, run_ranks

    # A script's command is for all machines; without one each has its own.
    says = not is_given() or options.nodes is None or not options.nodes.rank
    flags = ["--resume"] if start.resume else []
    if ranks_decide:
        flags += ["--overwrite"] if start.overwrite else []
        os.environ[GO_ON] = start.go_on or ""
    status = run_ranks(options, "moepp_megatron.cli.main", ["train", *flags, "--", *words])
    if status == STOPPED and says:
        say_go_on(start.go_on)
    if status != 0:
        raise typer.Exit(status)


def _words(
    config: Path,
    overrides: list[str] | None,
    nproc: int,
    max_restarts: int,
    log_dir: Path | None,
    nodes: Nodes | None,
) -> list[str]:
    """The arguments of this call without --resume and --overwrite."""
    words = [str(config), *(overrides or [])]
    if nproc > 1:
        words += ["--nproc", str(nproc)]
    if max_restarts > 0:
        words += ["--max-restarts", str(max_restarts)]
    if log_dir is not None:
        words += ["--log-dir", str(log_dir)]
    return words if nodes is None else [*words, *nodes.moepp_options()]


def _check_build_rank(rank: int | None, dry_run: bool, world_size: int) -> None:
    if rank is None:
        return
    if not dry_run:
        raise ConfigError(f"--build-rank ({rank}) must come with --dry-run; add --dry-run")
    if rank >= world_size:
        raise ConfigError(
            f"--build-rank ({rank}) must be below the number of ranks ({world_size}); use "
            f"{world_size - 1} for the last one"
        )


def _resumed(config: Config) -> Config:
    """`config` that starts from the run's own newest checkpoint, if there is one."""
    from moepp_megatron.training.checkpoint import list_checkpoints
    from moepp_megatron.training.run_folder import checkpoint_folder

    own = list_checkpoints(checkpoint_folder(config))
    # Without anything else to start from, `auto` alone decides, on all ranks together.
    if config.checkpoint.load is not None and not own:
        return config
    return with_overrides(config, ["checkpoint.load=auto", "checkpoint.load_optimizer=true"])


def _check_sinks(config: Config) -> None:
    """Refuse sinks that cannot work, where the rank that owns them starts."""
    from moepp_megatron.runtime.optional import have_wandb

    project, variable = config.observe.wandb.project, config.observe.webhook_url_env
    if project is not None and not have_wandb():
        raise UnfitError(
            f"observe.wandb.project ({project!r}) must have the package wandb, which is not "
            "installed; pip install 'moepp-megatron[wandb]', or set it to null"
        )
    if variable is None:
        return
    from moepp_megatron.observe.webhook import WebhookAddressError, read_address

    try:
        read_address(variable)
    except WebhookAddressError as error:
        raise ConfigError(f"observe.webhook_url_env ({variable}): {error}") from None


def _check_start(config: Config) -> None:
    """Refuse a `checkpoint.load` that names nothing or another model, before any rank starts."""
    from moepp_megatron.training.checkpoint import check_start
    from moepp_megatron.training.run_folder import checkpoint_folder

    check_start(config, checkpoint_folder(config))


def _train_rank(config: Config, layout: Layout) -> None:
    """Run one rank; if all ranks found nothing to start from, torchrun has nothing to report."""
    from moepp_megatron.training.checkpoint import NoStartError

    try:
        _train(config, layout)
    except NoStartError as error:
        from moepp_megatron.runtime.launch import leave
        from moepp_megatron.runtime.rank import RankEnvironment

        if RankEnvironment.read().rank == 0:
            echo(f"error: {error}", err=True)
        leave(error.exit_code)


def _train(config: Config, layout: Layout) -> None:
    """Train, and on rank 0 write the report and print what happened."""
    from moepp_megatron.runtime.quiet import quiet

    quiet()
    from moepp_megatron.runtime import distributed
    from moepp_megatron.runtime.parent import die_with_parent
    from moepp_megatron.runtime.rank import RankEnvironment
    from moepp_megatron.training.resilience import flight_recorder
    from moepp_megatron.training.trainer import Trainer

    rank = RankEnvironment.read()
    if rank.is_launched:
        die_with_parent(os.getppid())
    if config.resilience.hang_timeout_s > 0:
        flight_recorder.enable(Path(config.run.dir) / "hangs")
    with distributed.joined(rank, distributed.collective_timeout(config)):
        distributed.build_groups(config, layout)
        if rank.rank == 0:
            from moepp_megatron.runtime.backends import choices_to_log

            if (choices := choices_to_log()) is not None:
                echo(choices)
        trainer = Trainer(config, layout)
        if rank.rank == 0:
            for line in trainer.start_lines:
                echo(line)
        record = trainer.run()
    failure = trainer.failure
    if trainer.stopped:
        from moepp_megatron.runtime.launch import STOPPED, leave

        if failure is not None:
            raise OSError(failure)
        if rank.rank == 0:
            _say_stopped(trainer.progress.step)
        leave(STOPPED)
    if rank.rank == 0:
        _finish(config, record)
        if failure is not None:
            echo(f"error: at the end of the run, {failure}", err=True)
    if failure is not None:
        # All that could be done is done, but the run's last state is nowhere.
        raise typer.Exit(1)


def _say_stopped(step: int) -> None:
    """Print the step reached; the command to continue comes last, from a launcher if any."""
    from moepp_megatron.observe.status import inherited_claim

    echo(f"stopped on request at step {step}, saved")
    claim = inherited_claim()
    assert claim is not None, "rank 0 trains in a folder that it or its launcher has claimed"
    if claim.pid == os.getpid():
        say_go_on(claim.go_on)


def _finish(config: Config, record: StepMetrics | None) -> None:
    from moepp_megatron.training.run_folder import checkpoint_folder

    if record is None:
        echo("nothing left to do: the checkpoint is at training.train_iters already")
        return
    page = _report(Path(config.run.dir))
    share, window = _settled_ffn_share(Path(config.run.dir), record)
    valid = "" if record.valid_loss is None else f", validation {record.valid_loss:.4f}"
    echo(f"loss         {record.loss:.4f}{valid} after {record.tokens:,} tokens")
    echo(
        f"FFN share    {share:.3f} of all selections (phi {config.moe.ffn_share:.3f}): "
        f"{1.0 - share:.1%} of the expert work saved, mean of {window}"
    )
    echo(f"report       {page}")
    if config.checkpoint.save_interval > 0:
        echo(f"checkpoints  {checkpoint_folder(config)}")


def _settled_ffn_share(run: Path, last: StepMetrics) -> tuple[float, str]:
    """The FFN share of the page, and the steps over which it is the mean."""
    from moepp_megatron.observe.metrics import MetricsError
    from moepp_megatron.workbench.report.run_data import ReportError, load_run
    from moepp_megatron.workbench.report.summary import summarize

    try:
        summary = summarize(load_run(run))
    except (MetricsError, ReportError):
        # A full disk has cost the run its records.
        return last.ffn_fraction, f"step {last.step}"
    return summary.settled_ffn_fraction, summary.window


def _report(run: Path) -> str:
    """The written page, or why it could not be written, which does not fail the run."""
    from moepp_megatron.workbench.report import ReportError, build_report

    try:
        return str(build_report(run))
    except (OSError, ReportError) as error:
        return f"none ({error}); then: moepp report {shlex.quote(str(run))}"
