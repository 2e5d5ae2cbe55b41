"""Starts the runs of a pilot one after the other, and estimates the remaining time."""

from __future__ import annotations

import contextlib
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from moepp_megatron.runtime.launch import STOPPED, LaunchOptions, run_ranks
from moepp_megatron.runtime.stop_signals import STOP_SIGNALS
from moepp_megatron.training.occupancy import refuse_running
from moepp_megatron.workbench.experiments.pilot.runs import PilotFolder, PilotRun, RunFailed
from moepp_megatron.workbench.experiments.scaling.folder import failure_reason

# Statuses above it mean that somebody has asked this process to stop.
_SIGNALLED = 128


class Interrupted(Exception):
    """The process was asked to stop; finished runs are kept."""

    def __init__(self) -> None:
        super().__init__("interrupted; run again to go on")


@dataclass
class Pace:
    """Estimates the remaining time from the runs so far.

    Attributes:
        left: Steps of the runs that are missing.
        done: Steps of the finished runs.
        seconds: Time of these, start included.
    """

    left: int
    done: int = 0
    seconds: float = 0.0

    def finish(self, run: PilotRun, seconds: float) -> None:
        """Count a run that has ended."""
        self.left -= run.arm.steps
        self.done += run.arm.steps
        self.seconds += seconds

    @property
    def seconds_left(self) -> float | None:
        """Estimated remaining seconds; None before the first run has ended."""
        return self.seconds / self.done * self.left if self.done else None


def _start(folder: PilotFolder, run: PilotRun, nproc: int) -> int:
    """Run `moepp train` with a run's own configuration file, on this machine's ranks."""
    options = LaunchOptions(nproc, output=folder.log(run))
    arguments = ["train", "--", str(folder.config_file(run))]
    return run_ranks(options, "moepp_megatron.cli.main", arguments)


@dataclass(frozen=True)
class Jobs:
    """The jobs of a pilot.

    Attributes:
        folder: Folder of the runs.
        nproc: Ranks of each.
        start: Runs the ranks of a run and returns their exit status.
    """

    folder: PilotFolder
    nproc: int
    start: Callable[[PilotFolder, PilotRun, int], int] = _start

    def run(self, run: PilotRun) -> None:
        """Do one run; the remains of an interrupted one are removed.

        Raises:
            Interrupted: If stopped from outside.
            RunFailed: If it failed, or diverged.
            ConfigError: If another process is running it.
        """
        refuse_running(Path(run.config.run.dir))
        shutil.rmtree(run.config.run.dir, ignore_errors=True)
        status = self.start(self.folder, run, self.nproc)
        if status == STOPPED or status > _SIGNALLED:
            raise Interrupted
        if status != 0:
            log = self.folder.log(run)
            reason = failure_reason(log, status)
            see = "" if str(log) in reason else f"; see {log}"
            raise RunFailed(f"run {run.name} failed: {reason}{see}")
        if not self.folder.is_done(run):
            raise RunFailed(
                f"run {run.name} ended without a validation loss; see {self.folder.log(run)}"
            )

    def run_missing(
        self,
        runs: Sequence[PilotRun],
        progress: Callable[[str], object] = lambda what: None,
        finished: Callable[[PilotRun], object] = lambda run: None,
    ) -> None:
        """Do the unfinished runs, in order.

        Args:
            runs: All runs of the pilot.
            progress: Called with a line for people before each run.
            finished: Called after each run.

        Raises:
            Interrupted: If stopped from outside.
            RunFailed: If one failed; the later ones are not started.
        """
        missing = [run for run in runs if not self.folder.is_done(run)]
        pace = Pace(sum(run.arm.steps for run in missing))
        with _interruptible():
            for run in missing:
                progress(f"seed {run.seed}, {run.arm.name}{_left(pace.seconds_left)}")
                began = time.monotonic()
                self.run(run)
                pace.finish(run, time.monotonic() - began)
                finished(run)


def _left(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 90:
        return f" ({seconds:.0f} s left)"
    if seconds < 5400:
        return f" ({seconds / 60:.0f} min left)"
    return f" ({seconds / 3600:.1f} h left)"


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """A request to stop between two runs, or from the keyboard, is an `Interrupted` too."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted

    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
