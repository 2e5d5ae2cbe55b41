"""The command that continues a run: made here, printed by `train`, shown by `monitor`."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from moepp_megatron.cli.echo import echo_of_run
from moepp_megatron.observe.status import GO_ON

# Set by scripts that change folder: where their user's shell is.
_SHELL_FOLDER = "MOEPP_SHELL_FOLDER"


def go_on_command(arguments: Sequence[str]) -> str:
    """The shell command.

    Args:
        arguments: Arguments of `moepp train` without --resume and --overwrite: CONFIG, overrides,
            options.
    """
    if is_given():
        return os.environ[GO_ON]
    starter = _torchrun_command() if "RANK" in os.environ else None
    if starter is None:
        starter = [*_srun(arguments), *program(), "train", *arguments, "--resume"]
    return _from_here() + shlex.join(starter)


def is_given() -> bool:
    """Whether a script has given the command that starts it again."""
    return bool(os.environ.get(GO_ON))


def say_go_on(command: str | None) -> None:
    """Print the command, alone on the last line."""
    echo_of_run(f"to go on:\n{command}")


def program() -> list[str]:
    """The words with which this program was called."""
    called = Path(sys.argv[0])
    if called.name == "moepp":
        found = shutil.which("moepp")
        is_on_path = found is not None and os.path.realpath(found) == os.path.realpath(called)
        return ["moepp" if is_on_path else str(called)]
    return [sys.executable, "-m", "moepp_megatron.cli.main"]


def _torchrun_command() -> list[str] | None:
    """The parent's command line, that of a torchrun which the user has called."""
    import psutil

    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return None
    if "train" not in words or not any("torchrun" in w or "torch.distributed" in w for w in words):
        return None
    if len(words) > 1 and Path(words[1]).name == "torchrun":
        found = shutil.which("torchrun")
        words = ["torchrun" if found == words[1] else words[1], *words[2:]]
    words = [word for word in words if word not in ("--resume", "--overwrite")]
    place = len(words) - words[::-1].index("train")
    return [*words[:place], "--resume", *words[place:]]


def _srun(arguments: Sequence[str]) -> list[str]:
    """The step that srun has started, for a job of the same size.

    Not where a machine's number is among the arguments: all tasks would get the same.
    """
    if "--node-rank" in arguments:
        return []
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in os.environ or tasks == "1" or "SLURM_PROCID" not in os.environ:
        return []
    return ["srun", f"--nodes={os.environ.get('SLURM_STEP_NUM_NODES', '1')}", f"--ntasks={tasks}"]


def _from_here() -> str:
    """A change of folder that leads the user's shell to where this command works."""
    shell = os.environ.get(_SHELL_FOLDER)
    if shell is None or os.path.realpath(shell) == os.getcwd():
        return ""
    return f"cd {shlex.quote(os.getcwd())} && "
