"""Passes requests to stop from a launcher to its ranks, past torchrun."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

import psutil

from moepp_megatron.config.exit_codes import SIGNALLED

_PR_SET_PDEATHSIG = 1
# Loaded before any fork: the dynamic loader's lock may be held when one happens.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def die_with_parent(parent: int) -> None:
    """Let the kernel end this process when its parent, with this process id, ends.

    Without it a launcher that is killed outright leaves ranks behind, which occupy GPUs and ports.
    """
    if _LIBC is None:
        return
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


# These come again by themselves, from a shell and the kernel when a terminal closes, and each
# second beyond a limit of CPU time: nobody waits impatiently behind them.
REPEATED = (signal.SIGHUP, signal.SIGXCPU)
# By these a run is asked to stop. LSF and SGE warn of a job's end with SIGUSR2 and SIGXCPU.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, *REPEATED)
# Those that a shell or nohup has a program ignore, because they are not meant for it.
_IGNORABLE = (signal.SIGINT, signal.SIGHUP)
# Exit status of a process that Ctrl-C ended.
INTERRUPTED = SIGNALLED + signal.SIGINT
# One Ctrl-C may arrive twice: `timeout -s INT` signals the process and its group. A person takes
# longer for the second one, which ends everything at once.
SAME_INTERRUPT_S = 0.25
# How long ranks that were killed get to be gone: with much memory on a GPU it takes seconds.
_GONE_S = 30.0
_ACKNOWLEDGED = b"\nstopping after this step; Ctrl-C again ends at once, without saving\n"


@contextmanager
def starting(stoppable: bool) -> Iterator[None]:
    """Start children in the block with the stop signals blocked.

    torchrun never unblocks them. A rank unblocks them once it listens, so that a request that comes
    while it starts is neither lost nor fatal. Ranks that are not stoppable never see a
    terminal's SIGINT, which would have each of them print a traceback: the launcher ends them.
    """
    held_back = STOP_SIGNALS if stoppable else (signal.SIGINT,)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held_back)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass
class _StopRequests:
    """The state of a request to stop; torchrun may just be waiting for other machines.

    Attributes:
        met_no_rank: True if it came before there was a rank.
        number: The newest signal; 0 for none.
        at_once: True if all processes were killed.
        killed: Those below torchrun.
        interrupted_at: When the first Ctrl-C came.
    """

    met_no_rank: bool = False
    number: int = 0
    at_once: bool = False
    killed: list[psutil.Process] = field(default_factory=list)
    interrupted_at: float | None = None

    def is_second_interrupt(self, number: int) -> bool:
        """True if this signal is a second Ctrl-C."""
        if number != signal.SIGINT:
            return False
        now, first = time.monotonic(), self.interrupted_at
        if first is None:
            self.interrupted_at = now
            return False
        return now - first > SAME_INTERRUPT_S


def acknowledge() -> None:
    """Print an answer to the first Ctrl-C: a step, an evaluation or a save may take long."""
    # Not through sys.stderr, whose buffer the interrupted code may hold.
    with contextlib.suppress(OSError):
        os.write(2, _ACKNOWLEDGED)


def heeded_signals() -> list[signal.Signals]:
    """`STOP_SIGNALS` but for a SIGINT or SIGHUP that was ignored from the start.

    A shell starts background jobs of a script without SIGINT, nohup a program without SIGHUP.
    """
    return [
        number
        for number in STOP_SIGNALS
        if number not in _IGNORABLE or signal.getsignal(number) is not signal.SIG_IGN
    ]


@contextmanager
def passing_on_signals(agent: subprocess.Popen[bytes], stoppable: bool) -> Iterator[_StopRequests]:
    """Pass signals to this process on to the ranks below torchrun, in the block.

    `stoppable` ranks finish a step and save; others are ended.
    """
    request = _StopRequests()

    def pass_on(number: int, frame: FrameType | None) -> None:
        second = request.is_second_interrupt(number)
        if second or (number == signal.SIGINT and not stoppable):
            request.number, request.at_once = number, True
            request.killed += end_at_once(agent)
            return
        if number == signal.SIGINT and not request.number:
            acknowledge()
        if number in REPEATED and request.number:
            return
        request.number = number
        if agent.poll() is not None:
            return
        ranks = children(agent)
        for rank in ranks:
            # torchrun itself uses SIGTERM to end ranks, for good.
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(signal.SIGUSR1 if stoppable else number)
        if not ranks:
            request.met_no_rank = True
            agent.kill()

    before = {number: signal.signal(number, pass_on) for number in heeded_signals()}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_at_once(agent: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """End all processes, first torchrun, which would report each rank's end at length.

    Returns those below torchrun; see `wait_until_gone`.
    """
    family = children(agent, recursive=True)
    agent.kill()
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return family


def wait_until_gone(killed: list[psutil.Process]) -> None:
    """Wait until killed processes hold no memory and no device any more, half a minute at most."""
    deadline = time.monotonic() + _GONE_S
    while any(map(_is_alive, killed)) and time.monotonic() < deadline:
        time.sleep(0.02)


def _is_alive(process: psutil.Process) -> bool:
    # Nobody may be there to reap what has lost its parent.
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def children(agent: subprocess.Popen[bytes], recursive: bool = False) -> list[psutil.Process]:
    """The ranks that torchrun has started, or all that these have; none once it has ended."""
    try:
        return list(psutil.Process(agent.pid).children(recursive=recursive))
    except psutil.NoSuchProcess:
        return []
