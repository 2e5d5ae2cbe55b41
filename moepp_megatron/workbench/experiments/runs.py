"""Sets of runs that can be interrupted and go on.

A set of runs has a folder, and the folder has one set of settings: a command with other settings is
refused and told what differs. Every run has a name and ranks of its own, and runs follow each
other. What is finished stays finished, so the same command, given again, does only what is left.

DIR/logs/NAME.log  what the ranks of a run have printed, if this machine has started them
"""

from __future__ import annotations

import os
import re
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Protocol

from moepp_megatron.config import ConfigError
from moepp_megatron.file_names import CONFIG_FILE, RUN_FILES, RUN_FOLDERS
from moepp_megatron.runtime.atomic import lock
from moepp_megatron.runtime.launch import STOPPED, LaunchOptions, run_ranks
from moepp_megatron.runtime.stop_signals import heeded_signals

# How a rank says why it fails; `failure_reason` looks for it in the log.
FAILURE_MARK = "moepp: point failed on rank"
# Statuses above it mean that somebody has asked this process to stop.
_SIGNALLED = 128


class Interrupted(Exception):
    """Somebody has asked to stop; finished runs are kept.

    Attributes:
        status: Exit status of the ranks, or what a shell reports of the signal.
    """

    def __init__(self, name: str = "", status: int = STOPPED) -> None:
        at = f" at {name}" if name else ""
        super().__init__(f"interrupted{at}; run again to go on")
        self.status = status


class RunFailed(Exception):
    """A run has ended without a result; the message names it and what to read."""


class Named(Protocol):
    """A run of a set."""

    @property
    def name(self) -> str:
        """The name of its files; no two runs of a set share one."""


@dataclass
class Pace:
    """How long what is left will take, from what was run so far.

    Attributes:
        left: Work that the missing runs need, such as steps.
        done: Work of the runs that have ended.
        seconds: Time that those took, start included.
    """

    left: int
    done: int = 0
    seconds: float = 0.0

    def finish(self, work: int, seconds: float) -> None:
        """Count a run that has ended."""
        self.left -= work
        self.done += work
        self.seconds += seconds

    @property
    def seconds_left(self) -> float | None:
        """None before the first run with work has ended."""
        return self.seconds / self.done * self.left if self.done else None


class RunSet[Run: Named](ABC):
    """Runs of one folder; what they are and how one is done, a subclass says.

    Attributes:
        path: DIR.
        noun: What messages call the runs.
        parts: Subfolders of DIR.
    """

    noun: ClassVar[str] = "runs"
    parts: ClassVar[Sequence[str]] = ()

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def is_done(self, run: Run) -> bool:
        """Whether the run is finished."""

    @abstractmethod
    def do(self, run: Run) -> str | None:
        """Do one run, again if it was interrupted or has failed.

        Returns:
            Why it failed, where the others are to be done all the same; None for success.

        Raises:
            Interrupted: Stopped from outside.
            RunFailed: It failed, and the others are of no use without it.
        """

    def title(self, run: Run) -> str:
        """What people read while the run is done."""
        return run.name

    def work(self, run: Run) -> int:
        """How much there is to do, such as steps, to foretell the time left; 0 if unknown."""
        return 0

    def log(self, run: Run) -> Path:
        """What the run's ranks print."""
        return self.path / "logs" / f"{run.name}.log"

    def unfinished(self, runs: Sequence[Run]) -> list[Run]:
        """The runs that were never begun, were interrupted or have failed."""
        return [run for run in runs if not self.is_done(run)]

    def run_missing(
        self,
        runs: Sequence[Run],
        progress: Callable[[str], object] = lambda what: None,
        finished: Callable[[Run], object] = lambda run: None,
    ) -> dict[str, str]:
        """Do what is not finished, in order.

        Args:
            runs: All runs of the set.
            progress: Called with a line for people before each run.
            finished: Called after each run.

        Returns:
            Why runs failed, by name.

        Raises:
            Interrupted: Stopped from outside; between two runs, too.
            RunFailed: Same as for `do`; the later runs are not begun.
            ConfigError: Another command is doing runs of this folder.
        """
        missing, failures = self.unfinished(runs), {}
        pace = Pace(sum(map(self.work, missing)))
        with self._alone(self.path), _interruptible():
            for run in missing:
                progress(f"{self.title(run)}{_left(pace.seconds_left)}")
                began = time.monotonic()
                reason = self.do(run)
                if reason is not None:
                    failures[run.name] = reason
                pace.finish(self.work(run), time.monotonic() - began)
                finished(run)
        return failures

    def launch(self, run: Run, options: LaunchOptions, arguments: Sequence[str]) -> str | None:
        """`moepp arguments` on ranks of this machine.

        Args:
            run: The run that they do.
            options: How to start them; the output is a log.
            arguments: What follows `moepp`.

        Returns:
            Why it failed, on one line, or None.

        Raises:
            Interrupted: Stopped from outside.
            ConfigError: Another command is doing this run.
        """
        assert options.output is not None, "a log to find the reason in"
        options.output.parent.mkdir(parents=True, exist_ok=True)
        # Batch jobs may do other runs of the same folder at the same time.
        with self._alone(options.output):
            status = run_ranks(options, "moepp_megatron.cli.main", arguments)
        if status == STOPPED or status > _SIGNALLED:
            raise Interrupted(run.name, status)
        return None if status == 0 else failure_reason(options.output, status)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Make DIR with its parts; the body may write there.

        Raises:
            ConfigError: A training run is there, or the file system refuses one of them; names
                `--out` and the cause.
        """
        # But for a configuration, which this command may read.
        for name in (*RUN_FILES, *RUN_FOLDERS):
            if name != CONFIG_FILE and os.path.lexists(self.path / name):
                raise ConfigError(
                    f"--out ({self.path}) must not be the folder of a training run, but holds "
                    f"{name}; choose another"
                )
        try:
            for part in self.parts:
                (self.path / part).mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            raise ConfigError(
                f"--out ({self.path}) must be a folder that can be written ({error.strerror}); "
                "choose another one"
            ) from None

    @contextmanager
    def _alone(self, path: Path) -> Iterator[None]:
        """Hold a folder, or the log of a run, against other commands."""
        # The lock ends with the process, however that ends. Where the file system has no locks, two
        # commands can work at the same time.
        descriptor = os.open(
            path, os.O_RDONLY if path.is_dir() else os.O_RDONLY | os.O_CREAT, 0o666
        )
        try:
            if not lock(descriptor):
                what = path.name.removesuffix(".log")
                raise ConfigError(
                    f"--out ({self.path}) must be used by one command at a time, and another "
                    f"one is at work on {what}; wait for it, or choose another folder"
                )
            yield
        finally:
            os.close(descriptor)

    def other_settings(self, what: str) -> ConfigError:
        """The error that DIR belongs to other settings; `what` says which."""
        return ConfigError(
            f"--out ({self.path}) must be new or hold {self.noun} of the same settings, and "
            f"{what}; choose another folder"
        )


def in_turns[Item, Round](
    items: Sequence[Item], rounds: Sequence[Round]
) -> list[tuple[Item, Round]]:
    """Every item with every round, round by round; each round begins with another item.

    A machine that gets slower or faster in the meantime then favours no item.
    """
    turns = [(index % len(items), one) for index, one in enumerate(rounds)]
    return [(item, one) for turn, one in turns for item in [*items[turn:], *items[:turn]]]


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, str]:
    """Dotted names of the settings that differ, with both values: "8, now 16".

    Args:
        found: Values by section and key.
        wanted: Other values; only its sections and keys are compared.
    """
    differing = {}
    for section, keys in wanted.items():
        before = found.get(section)
        if not isinstance(before, dict) or not isinstance(keys, dict):
            differing[section] = f"{before}, now {keys}"
            continue
        for key, value in keys.items():
            if before.get(key) != value:
                differing[f"{section}.{key}"] = f"{before.get(key)}, now {value}"
    return differing


def failure_reason(log: Path, status: int) -> str:
    """Why the ranks with this `log` ended with `status`, on one line."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    # The first rank to fail is the cause of the others' failures.
    for pattern in (rf"{FAILURE_MARK} (.*)", r"^error: (.*)", r"(Signal \d+ \(SIG\w+\))"):
        found = re.search(pattern, text, re.MULTILINE)
        if found is not None:
            said = found.group(1).strip()
            return f"rank {said}" if pattern.startswith(FAILURE_MARK) else said
    return f"exit status {status}; {log} may say more"


def _left(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 90:
        return f" ({seconds:.0f} s left)"
    if seconds < 5400:
        return f" ({seconds / 60:.0f} min left)"
    return f" ({seconds / 3600:.1f} h left)"


@contextmanager
def _interruptible() -> Iterator[None]:
    """A request to stop between two runs is an `Interrupted` as well."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(status=_SIGNALLED + number)

    before = {number: signal.signal(number, stop) for number in heeded_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
