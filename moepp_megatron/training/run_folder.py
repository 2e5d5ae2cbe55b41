"""The folder of a run."""

from __future__ import annotations

import subprocess
from pathlib import Path

from moepp_megatron import __version__
from moepp_megatron.config import Config
from moepp_megatron.runtime.atomic import write_atomic


def checkpoint_folder(config: Config) -> Path:
    """Where the run's checkpoints are."""
    return Path(config.checkpoint.folder(config.run.dir))


def write_config(config: Config) -> Path:
    """Write `RUN/config.yaml`: the resolved configuration with version and git commit."""
    folder = Path(config.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    comment = f"moepp_megatron {__version__}, commit {_git_commit()}"
    write_atomic(path, config.to_yaml(comment).encode())
    return path


def _git_commit() -> str:
    """The commit of the code that runs, or `unknown` outside a repository."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
