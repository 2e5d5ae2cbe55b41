"""Starts this machine's ranks with torchrun and looks after them."""

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from moepp_megatron.config.exit_codes import HUNG, LOST, REFUSED, STOPPED, UNFIT
from moepp_megatron.runtime.atomic import write_atomic
from moepp_megatron.runtime.nodes import Meeting, Nodes
from moepp_megatron.runtime.rank import NODE_RANK
from moepp_megatron.runtime.rank_environment import (
    check_rank_variables,
    make_log_dir,
    with_rank_variables,
)
from moepp_megatron.runtime.stop_signals import (
    children,
    die_with_parent,
    end_at_once,
    heeded_signals,
    passing_on_signals,
    starting,
    wait_until_gone,
)

# A user's error, which the rank has said in one line, and restarting ranks would only repeat.
_REFUSALS = (REFUSED, UNFIT)
# What differs from other failures of torchrun, which makes all of them 1.
_REPORTED_FAILURES = (HUNG, *_REFUSALS)

# torchrun turns every status of a rank but 0 into 1, and restarts all ranks. So ranks that stop on
# request leave with 0, and what a status meant is written down here.
_STATUS_FILE = "MOEPP_STATUS_FILE"
# The machines, and what must be the same on all of them, for torchrun's process.
MACHINES = "MOEPP_MACHINES"

# How often a launcher looks at its ranks.
_POLL_S = 0.2
# How long torchrun gets to end by itself after a user's error.
_REFUSAL_GRACE_S = 3.0


@dataclass(frozen=True)
class LaunchOptions:
    """Launch options.

    Attributes:
        num_local_ranks: Ranks on this machine.
        nodes: The machines; None for this one only.
        max_restarts: Maximum restarts of all ranks after one has died.
        log_dir: Folder of this machine for each rank's output, which is shown as well; or None.
        stoppable: True if ranks finish a step and save when asked to stop
            (`training.signals.StopRequest`); others are ended.
        output: File for all that torchrun and the ranks print; None for this process's output.
        alike: Values that must match on all machines, by name; one that differs is refused.
    """

    num_local_ranks: int
    nodes: Nodes | None = None
    max_restarts: int = 0
    log_dir: Path | None = None
    stoppable: bool = False
    output: Path | None = None
    alike: Mapping[str, str] = field(default_factory=dict)


def run_ranks(options: LaunchOptions, module: str, arguments: Sequence[str]) -> int:
    """Run `python -m module arguments` on this machine's ranks and wait; no shell is involved.

    The stop signals that this process receives are passed on to the ranks, not to torchrun, which
    would end them after a fixed time whether they have saved or not. Slurm sends its SIGTERM to all
    processes of a job at once, and a terminal its SIGINT and SIGHUP to all of the foreground, so
    torchrun does not get to see those either. A second SIGINT ends everything at once, and so does
    the first one where ranks are not stoppable.

    Returns:
        The exit status: 0 when every rank of this machine ended with 0, or what a rank passed to
        `leave` (such as `STOPPED`); `HUNG` when they made no progress; `LOST` when other machines
        were missing; that of another machine that has failed for good; 128 + number when this
        process was asked by a signal to end ranks that are not stoppable, or to end them at once,
        and when a signal has ended torchrun; otherwise torchrun's.
    """
    check_rank_variables(os.environ)
    if options.log_dir is not None:
        make_log_dir(options.log_dir)
    interface = options.nodes.interface() if options.nodes is not None else None
    environment = with_rank_variables(os.environ, options.num_local_ranks, interface)
    if (nodes := options.nodes) is not None:
        # A store of its own for each attempt: agents count restarts differently, and a store that
        # they keep holds the addresses of dead ranks.
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        where, wait_s = f"{nodes.count} machines at {nodes.host}:{nodes.port}", nodes.join_timeout_s
        after = f"{nodes.restart_timeout_s} s after a failure"
        print(f"waiting for {where}, {wait_s} s at most, {after}", file=sys.stderr, flush=True)
        sizes = {"--nnodes": str(nodes.count), "--nproc": str(options.num_local_ranks)}
        environment[MACHINES] = json.dumps([asdict(nodes), {**sizes, **options.alike}])
        if nodes.rank is not None:
            environment[NODE_RANK] = str(nodes.rank)
    with tempfile.TemporaryDirectory(prefix="moepp-") as folder:
        status_file = Path(folder) / "status"
        environment[_STATUS_FILE] = str(status_file)
        status = _run(_torchrun(options, module, arguments), environment, options, status_file)
        written = _written(status_file)[0] or 0
    if status == 0:
        # After a hang torchrun has restarted all ranks, with success.
        return 0 if written == HUNG else written
    # A run that ranks have left, as one that was stopped, can fail after all.
    return written if written in _REPORTED_FAILURES else status


def leave(status: int, reason: str = "") -> None:
    """End this rank with `status`; under `run_ranks` the status reaches the caller instead."""
    sys.exit(0 if write_status(status, reason) else status)


def has_launcher() -> bool:
    """True if `run_ranks` started this process as a rank and printed the run's messages."""
    return _STATUS_FILE in os.environ


def refusal() -> tuple[int, str] | None:
    """Status and message with which a rank of this machine (`run_ranks`) refused a user's error."""
    status, reason = _written(Path(os.environ.get(_STATUS_FILE, "")))
    return (status, reason) if status is not None and status in _REFUSALS else None


def write_status(status: int, reason: str = "") -> bool:
    """Report this rank's exit status to `run_ranks`; False if the process has no launcher."""
    status_file = os.environ.get(_STATUS_FILE)
    if status_file is None:
        return False
    # In one step, since all ranks of the machine may write.
    write_atomic(Path(status_file), f"{status}\n{reason}".encode(), is_synced=False)
    return True


def _torchrun(options: LaunchOptions, module: str, arguments: Sequence[str]) -> list[str]:
    # Ranks of one machine meet there by address: a machine without a network may not know its name.
    alone = ["--standalone", "--local-addr=127.0.0.1"]
    where = alone if options.nodes is None else options.nodes.torchrun_options()
    logs: list[str] = []
    if options.log_dir is not None:
        logs = [f"--log-dir={options.log_dir}", "--redirects=3", "--tee=3"]
    return [
        sys.executable,
        "-m",
        "moepp_megatron.runtime.agent",
        *where,
        f"--nproc-per-node={options.num_local_ranks}",
        f"--max-restarts={options.max_restarts}",
        # How long the agent takes to notice a dead rank.
        "--monitor-interval=0.5",
        # Its handler would end what nohup protects, and have ranks listen to it again.
        f"--signals-to-handle={','.join(number.name for number in heeded_signals())}",
        *logs,
        "--module",
        module,
        # What follows is not torchrun's: it would take `--max` for the start of one of its own.
        "--",
        *arguments,
    ]


def _run(
    command: list[str], environment: dict[str, str], options: LaunchOptions, status_file: Path
) -> int:
    stoppable, file = options.stoppable, options.output
    opened = contextlib.nullcontext() if file is None else file.open("wb")
    with starting(stoppable), opened as output:
        agent = subprocess.Popen(
            command,
            env=environment,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            preexec_fn=functools.partial(die_with_parent, os.getpid()),
        )
    with passing_on_signals(agent, stoppable) as request:
        try:
            status = _wait(agent, options.nodes, status_file)
        finally:
            agent.kill()
            agent.wait()
            wait_until_gone(request.killed)
    if status == 0:
        return 0
    if request.at_once or (not stoppable and request.number):
        return 128 + request.number
    if request.met_no_rank:
        # Nothing ran that could have been lost.
        return STOPPED
    # As a shell reports a process that a signal has ended.
    return 128 - status if status < 0 else status


def _wait(agent: subprocess.Popen[bytes], nodes: Nodes | None, status_file: Path) -> int:
    """The exit status of torchrun, or `LOST` when it waits too long for the other machines."""
    meeting = None if nodes is None else Meeting(nodes, time.monotonic())
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return agent.wait(_POLL_S)
        written, _ = _written(status_file)
        if meeting is None:
            if written in _REFUSALS:
                # Time for torchrun to pass on what ranks have printed.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return agent.wait(_REFUSAL_GRACE_S)
                wait_until_gone(end_at_once(agent))
                return 1
            continue
        # Where ranks have ended well, torchrun waits for those of the other machines to end.
        at_work = written in (0, STOPPED) or bool(children(agent))
        failure = meeting.failure(at_work, time.monotonic())
        if failure is not None:
            print(f"error: {failure}; exit status {LOST}", file=sys.stderr, flush=True)
            return LOST


def _written(status_file: Path) -> tuple[int | None, str]:
    """The exit status that the last rank reported, None for none, and its reason."""
    text = status_file.read_text(encoding="utf-8") if status_file.is_file() else ""
    status, _, reason = text.partition("\n")
    return int(status) if status else None, reason
