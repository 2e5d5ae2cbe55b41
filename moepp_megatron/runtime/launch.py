"""Starts ranks on this machine with torchrun and looks after them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil

# Exit status of a run that was asked to stop and has saved: run it again.
STOPPED = 75

# A rank that leaves with another status than 0 makes torchrun restart all of them. Ranks that stop
# on request therefore leave with 0 and write down what it meant.
_STATUS_FILE = "MOEPP_STATUS_FILE"


def run_ranks(num_ranks: int, module: str, arguments: Sequence[str], max_restarts: int = 0) -> int:
    """Run `python -m module arguments` on `num_ranks` ranks of this machine and wait.

    SIGTERM and SIGUSR1 that this process receives are passed on to the ranks, not to torchrun,
    which would end them after a fixed time whether they have saved or not.

    Args:
        num_ranks: Ranks to start.
        module: Module to run as main.
        arguments: Its arguments, passed on as they are, never through a shell.
        max_restarts: How often to start all ranks anew after one has died.

    Returns:
        The exit status: 0 when every rank ended with 0, `STOPPED` when they stopped on request.
    """
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={num_ranks}",
        f"--max-restarts={max_restarts}",
        # How long the agent takes to notice a dead rank.
        "--monitor-interval=0.5",
        "--module",
        module,
        *arguments,
    ]
    environment = dict(os.environ)
    # One thread a core in all; torchrun would warn and choose 1 whatever the machine has.
    threads = max(1, len(os.sched_getaffinity(0)) // num_ranks)
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    with tempfile.TemporaryDirectory(prefix="moepp-") as folder:
        status_file = Path(folder) / "status"
        environment[_STATUS_FILE] = str(status_file)
        agent = subprocess.Popen(command, env=environment)
        with _passing_on_signals(agent):
            status = agent.wait()
        if status == 0 and status_file.exists():
            return int(status_file.read_text(encoding="ascii"))
    return status


def leave(status: int) -> None:
    """End this rank with `status`; under `run_ranks` the status reaches the caller instead."""
    status_file = os.environ.get(_STATUS_FILE)
    if status_file is None:
        sys.exit(status)
    if os.environ.get("RANK", "0") == "0":
        Path(status_file).write_text(str(status), encoding="ascii")
    sys.exit(0)


@contextmanager
def _passing_on_signals(agent: subprocess.Popen[bytes]) -> Iterator[None]:
    def pass_on(number: int, frame: FrameType | None) -> None:
        try:
            ranks = psutil.Process(agent.pid).children()
        except psutil.NoSuchProcess:
            return
        for rank in ranks:
            try:
                rank.send_signal(number)
            except psutil.NoSuchProcess:
                continue

    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
