"""`moepp train`: trains; alone with several ranks it starts torchrun itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moepp_megatron.config import (
    Config,
    ConfigError,
    Layout,
    check_config,
    check_world_size,
    load_config,
    with_overrides,
)

if TYPE_CHECKING:
    from moepp_megatron.observe.metrics import StepMetrics


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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Validate, print rank grid and parameters, stop.")
    ] = False,
) -> None:
    """Train the model that CONFIG describes."""
    # Read from the environment only: asking torch would cost seconds before an error shows.
    from moepp_megatron.runtime.rank import RankEnvironment

    rank = RankEnvironment.read()
    settings = load_config(config, overrides or [])
    world_size = rank.world_size if rank.is_launched else nproc
    layout = Layout.from_config(settings, world_size)
    if rank.rank == 0:
        for warning in check_config(settings) + check_world_size(settings, world_size):
            typer.echo(f"warning: {warning}", err=True)
    if dry_run:
        from moepp_megatron.cli.dry_run import print_plan

        print_plan(settings, layout)
        return
    from moepp_megatron.runtime.fit import check_fit

    check_fit(settings)
    if settings.telemetry.hardware is not None:
        from moepp_megatron.config.hardware import load_hardware

        load_hardware(settings.telemetry.hardware)
    _check_data(settings)
    _check_start(settings)
    if rank.is_launched or (nproc == 1 and max_restarts == 0):
        if rank.restart_count > 0:
            settings = with_overrides(settings, ["checkpoint.load=auto"])
        _train_rank(settings, layout)
        return
    from moepp_megatron.runtime.launch import run_ranks

    arguments = ["train", str(config), *(overrides or [])]
    status = run_ranks(nproc, "moepp_megatron.cli.main", arguments, max_restarts)
    if status != 0:
        raise typer.Exit(status)


def _check_data(config: Config) -> None:
    """Refuse what training would refuse, before any rank starts."""
    from moepp_megatron.data.manifest import Manifest

    if config.data.path is None:
        raise ConfigError("data.path (null) must name a prepared folder; see: moepp data prepare")
    path = Path(config.data.path)
    try:
        manifest = Manifest.read(path)
    except (OSError, ValueError):
        raise ConfigError(
            f"data.path ({path}) must be a prepared folder; run: "
            f"moepp data prepare SOURCE... --out {path}"
        ) from None
    if manifest.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size ({config.model.vocab_size}) must hold every token of data.path "
            f"({manifest.vocab_size}); use {manifest.vocab_size} or more"
        )


def _check_start(config: Config) -> None:
    """Refuse a `checkpoint.load` that names nothing or another model, before any rank starts."""
    from moepp_megatron.training.checkpoint import check_start
    from moepp_megatron.training.run_folder import checkpoint_folder

    check_start(config, checkpoint_folder(config))


def _train_rank(config: Config, layout: Layout) -> None:
    """Be one rank: train, and on rank 0 write the report and print what happened."""
    from moepp_megatron.runtime.quiet import quiet

    quiet()
    from moepp_megatron.runtime import distributed
    from moepp_megatron.runtime.rank import RankEnvironment
    from moepp_megatron.training.resilience import flight_recorder
    from moepp_megatron.training.trainer import Trainer

    rank = RankEnvironment.read()
    if config.resilience.hang_timeout_s > 0:
        flight_recorder.enable(Path(config.run.dir) / "hangs")
    distributed.start(rank, distributed.collective_timeout(config))
    distributed.build_groups(config, layout)
    if rank.rank == 0:
        from moepp_megatron.runtime.backends import choices_line

        typer.echo(choices_line())
    trainer = Trainer(config, layout)
    record = trainer.run()
    distributed.stop()
    failure = trainer.checkpoints.error
    if trainer.stopped:
        from moepp_megatron.runtime.launch import STOPPED, leave

        if failure is not None:
            raise OSError(failure)
        if rank.rank == 0:
            typer.echo(f"stopped on request at step {trainer.progress.step}; run again to go on")
        leave(STOPPED)
    if rank.rank == 0:
        _finish(config, record)
        if failure is not None:
            typer.echo(f"error: the last {failure}", err=True)
    if failure is not None:
        # All that could be done is done, but the run's last state is nowhere.
        raise typer.Exit(1)


def _finish(config: Config, record: StepMetrics | None) -> None:
    from moepp_megatron.report import build_report
    from moepp_megatron.training.run_folder import checkpoint_folder

    if record is None:
        typer.echo("nothing left to do: the checkpoint is at training.train_iters already")
        return
    page = build_report(Path(config.run.dir))
    valid = "" if record.valid_loss is None else f", validation {record.valid_loss:.4f}"
    saved = 1.0 - record.ffn_fraction
    typer.echo(f"loss         {record.loss:.4f}{valid} after {record.tokens:,} tokens")
    typer.echo(
        f"FFN share    {record.ffn_fraction:.3f} of all selections "
        f"(phi {config.moe.ffn_share:.3f}): {saved:.1%} of the expert work saved"
    )
    typer.echo(f"report       {page}")
    if config.checkpoint.save_interval > 0:
        typer.echo(f"checkpoints  {checkpoint_folder(config)}")
