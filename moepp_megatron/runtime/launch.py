"""Starts ranks on this machine with torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence


def run_ranks(num_ranks: int, module: str, arguments: Sequence[str]) -> int:
    """Run `python -m module arguments` on `num_ranks` ranks of this machine and wait.

    Args:
        num_ranks: Ranks to start.
        module: Module to run as main.
        arguments: Its arguments, passed on as they are, never through a shell.

    Returns:
        The exit status: 0 when every rank ended with 0.
    """
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={num_ranks}",
        "--module",
        module,
        *arguments,
    ]
    environment = dict(os.environ)
    # One thread a core in all; torchrun would warn and choose 1 whatever the machine has.
    threads = max(1, len(os.sched_getaffinity(0)) // num_ranks)
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    return subprocess.run(command, env=environment, check=False).returncode
