"""Prints how a run of `moepp train` ended, and the command that resumes it."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from moepp_megatron.cli.echo import echo
from moepp_megatron.config import Config
from moepp_megatron.config.exit_codes import FAILED
from moepp_megatron.observe.status import RESUME_COMMAND
from moepp_megatron.runtime.optional import missing

if TYPE_CHECKING:
    from moepp_megatron.observe.metrics import StepMetrics
    from moepp_megatron.tools.report.summary import RunSummary
    from moepp_megatron.training.run import TrainResult
    from moepp_megatron.training.train_request import TrainRequest

# Set by scripts that change folder: where their user's shell is.
_SHELL_FOLDER = "MOEPP_SHELL_FOLDER"


def resume_command(arguments: Sequence[str]) -> str:
    """Return the shell command that resumes a run.

    Args:
        arguments: Arguments of `moepp train` without --resume and --overwrite: CONFIG, overrides,
            options. The ranks of a launcher, who were given no options, get those of their number.
    """
    if is_given():
        return os.environ[RESUME_COMMAND]
    words = [*_program(), "train", *arguments, *_launched_ranks(), "--resume"]
    return _from_here() + shlex.join([*_srun(arguments), *words])


def is_given() -> bool:
    """True if a script has given the command that starts it again."""
    return bool(os.environ.get(RESUME_COMMAND))


def _program() -> list[str]:
    """The words with which this program was called."""
    called = sys.argv[0]
    if Path(called).name != "moepp":
        return [sys.executable, "-m", "moepp_megatron.cli.main"]
    on_path = shutil.which("moepp")
    is_same = on_path is not None and os.path.realpath(on_path) == os.path.realpath(called)
    return ["moepp" if is_same else called]


def _launched_ranks() -> list[str]:
    """Options that start the ranks which a torchrun of the user's has started."""
    ranks, machines = (os.environ.get(f"{of}_WORLD_SIZE", "1") for of in ("LOCAL", "GROUP"))
    if "RANK" not in os.environ:
        return []
    words = [] if ranks == "1" else ["--nproc", ranks]
    if machines != "1":
        words += ["--nnodes", machines, "--rdzv-endpoint", os.environ.get("MASTER_ADDR", "HOST")]
    return words


def _srun(arguments: Sequence[str]) -> list[str]:
    """The srun of this task, unless each machine has a command of its own (--node-rank)."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    is_task = "SLURM_PROCID" in os.environ and "RANK" not in os.environ and tasks != "1"
    if not is_task or "--node-rank" in arguments:
        return []
    return ["srun", f"--nodes={os.environ.get('SLURM_STEP_NUM_NODES', '1')}", f"--ntasks={tasks}"]


def _from_here() -> str:
    """A change of folder that leads the user's shell to where this command works."""
    shell = os.environ.get(_SHELL_FOLDER)
    if shell is None or os.path.realpath(shell) == os.getcwd():
        return ""
    return f"cd {shlex.quote(os.getcwd())} && "


def print_end(request: TrainRequest, result: TrainResult, prints_command: bool) -> None:
    """Write the report on rank 0, print what happened, and leave with the run's exit status.

    Args:
        request: What was asked for.
        result: How it ended.
        prints_command: Whether a launcher prints how to resume a run that was asked to stop.
    """
    from moepp_megatron.config.exit_codes import STOPPED
    from moepp_megatron.observe.status import RunStatus
    from moepp_megatron.runtime.launch import leave

    is_rank_0 = request.rank.rank == 0 and not request.starts_ranks
    if result.stopped and result.failure is None:
        if is_rank_0:
            echo(f"{result.pause_reason or 'stopped on request'} at step {result.step}, saved")
        # Said last: by the launcher that has claimed the folder, if one has.
        own_claim = is_rank_0 and RunStatus.inherited() is None
        if own_claim or (request.starts_ranks and prints_command):
            echo(f"to resume:\n{request.start.resume_command}")
        leave(STOPPED)
    if is_rank_0:
        if not result.stopped:
            _finish(request.config, result.metrics)
        if result.failure is not None:
            echo(f"error: at the end of the run, {result.failure}", err=True)
    if result.failure is not None:
        # All that could be done is done, but the run's last state is nowhere.
        raise typer.Exit(FAILED)


def _finish(config: Config, record: StepMetrics | None) -> None:
    from moepp_megatron.training.run_folder import checkpoint_folder

    summary, page = _report(Path(config.run.dir))
    if record is None:
        # A run that was killed after its last checkpoint has no page yet.
        echo("nothing left to do: the checkpoint is at training.train_iters already")
        echo(f"report       {page}")
        return
    share, window = record.ffn_fraction, f"step {record.step}"
    # A full disk may have cost the run its records.
    if summary is not None:
        share, window = summary.tail_ffn_fraction, summary.window
    valid = "" if record.valid_loss is None else f", validation {record.valid_loss:.4f}"
    echo(f"loss         {record.loss:.4f}{valid} after {record.tokens:,} tokens")
    for name, loss in (record.valid_set_loss or {}).items():
        echo(f"             validation of {name} {loss:.4f}")
    echo(
        f"FFN share    {share:.3f} of all selections (phi {config.moe.ffn_share:.3f}): "
        f"{1.0 - share:.1%} of the expert work saved, mean of {window}"
    )
    echo(f"report       {page}")
    if config.checkpoint.save_interval > 0:
        echo(f"checkpoints  {checkpoint_folder(config)}")


def _report(run: Path) -> tuple[RunSummary | None, str]:
    """The numbers of what is recorded, and the page, or why one is missing: that ends no run."""
    from moepp_megatron.observe.metrics import MetricsError
    from moepp_megatron.tools.report.run_data import ReportError, load_run
    from moepp_megatron.tools.report.summary import summarize

    summary = None
    try:
        recorded = load_run(run)
        summary = summarize(recorded)
        from moepp_megatron.tools.report.page import write_run_page

        return summary, str(write_run_page(recorded))
    except (OSError, MetricsError, ReportError, ModuleNotFoundError) as error:
        reason = missing(error) if isinstance(error, ModuleNotFoundError) else error
        return summary, f"none ({reason}); then: moepp report {shlex.quote(str(run))}"
