"""The command that resumes a run: printed by `train`, shown by `monitor`."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from moepp_megatron.observe.status import RESUME_COMMAND

# Set by scripts that change folder: where their user's shell is.
_SHELL_FOLDER = "MOEPP_SHELL_FOLDER"


def resume_command(arguments: Sequence[str]) -> str:
    """The shell command.

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
