"""The runner of all experiments: arms x seeds, each pair a trial that ranks of its own measure.

An experiment has a folder, and the folder has one set of settings: a command with other settings is
refused with what differs. Trials follow each other. A finished one stays finished, so the same
command, given again, does only what is left.

DIR/settings.json  the settings that all trials share
DIR/logs/NAME.log  output of a trial's ranks, if this machine has started them
"""

import json
import os
import re
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from moepp_megatron.config import ConfigError
from moepp_megatron.config.exit_codes import SIGNALLED, STOPPED
from moepp_megatron.config.json_file import read_json
from moepp_megatron.file_names import CONFIG_FILE, RUN_FILES, RUN_FOLDERS
from moepp_megatron.runtime.atomic import lock, write_atomic
from moepp_megatron.runtime.launch import LaunchOptions, run_ranks
from moepp_megatron.runtime.nodes import Nodes
from moepp_megatron.runtime.stop_signals import heeded_signals

SETTINGS_FILE = "settings.json"


class Interrupted(Exception):
    """A request to stop; `status` is the ranks' exit status, or the one a shell gives a signal."""

    def __init__(self, name: str = "", status: int = STOPPED) -> None:
        at = f" at {name}" if name else ""
        super().__init__(f"interrupted{at}; run again to continue")
        self.status = status


class RunFailed(Exception):
    """A trial has ended without a result of use; the message names it and what to read."""


@dataclass(frozen=True)
class Trial[Result](ABC):
    """One arm with one seed; a subclass says how it is measured.

    `folder` is DIR, where no two trials share a `name`, that of its files. People read `title`
    while `nproc` ranks, over all machines, run `moepp` with the arguments `command`.
    """

    folder: Path
    name: str
    title: str
    nproc: int
    command: Sequence[str]

    @abstractmethod
    def result(self) -> Result | None:
        """Read the result; None if never begun, interrupted or failed; RunFailed if of no use."""

    @property
    def log(self) -> Path:
        """Log of its ranks."""
        return self.folder / "logs" / f"{self.name}.log"

    def prepare(self) -> None:
        """Make what its ranks need, and remove what an interrupted attempt has left."""
        self.log.parent.mkdir(parents=True, exist_ok=True)


def missing[T: Trial[Any]](trials: Sequence[T]) -> list[T]:
    """The trials that have no result."""
    return [trial for trial in trials if trial.result() is None]


def run_missing(
    trials: Sequence[Trial[Any]],
    progress: Callable[[str], object] = lambda title: None,
    failures: list[RunFailed] | None = None,
) -> None:
    """Do those of a folder's trials that have no result, in order.

    `progress` is called with the title of each before it is begun. `failures` takes failures, after
    which the next trial is begun; None raises the first.

    Raises:
        Interrupted: Stopped from outside; between two trials, too.
        RunFailed: A trial has failed.
        ConfigError: Another command is doing trials of this folder.
    """
    left = missing(trials)
    if not left:
        return
    with _exclusive(left[0], left[0].folder), _interruptible():
        # Another command may have finished some just now.
        for trial in missing(left):
            progress(trial.title)
            try:
                run_trial(trial)
            except RunFailed as failure:
                if failures is None:
                    raise
                failures.append(failure)


def run_trial(trial: Trial[Any], nodes: Nodes | None = None) -> None:
    """Do one trial, again if it was interrupted or has failed; each machine of `nodes` must call.

    Raises:
        Interrupted: Stopped from outside.
        RunFailed: Its ranks have failed, or left no result.
        ConfigError: Another command is doing it, or its ranks cannot be shared out over machines.
    """
    count, node = (nodes.count, nodes.rank or 0) if nodes is not None else (1, 0)
    if trial.nproc % count:
        raise ConfigError(
            f"--nnodes ({count}) must divide the ranks of --point ({trial.nproc}); use 1"
        )
    log = trial.log.with_name(f"{trial.name}.node{node}.log") if node else trial.log
    trial.prepare()
    # Batch jobs may do other trials of the same folder at the same time.
    with _exclusive(trial, log):
        options = LaunchOptions(trial.nproc // count, nodes, output=log)
        status = run_ranks(options, "moepp_megatron.cli.main", trial.command)
    if status == STOPPED or status > SIGNALLED:
        raise Interrupted(trial.name, status)
    if status != 0:
        raise RunFailed(f"{trial.name} failed: {_reason(log, status)}")
    if node == 0 and trial.result() is None:
        raise RunFailed(f"{trial.name} failed: it has left no result; see {log}")


def claim(
    folder: Path,
    settings: Mapping[str, Any],
    parts: Sequence[str],
    files: Mapping[Path, str] | None = None,
) -> None:
    """Make an experiment's folder, or check that it belongs to one of the same settings.

    The first command writes `settings`, by section and key; `parts` are subfolders, `files` texts
    to write. ConfigError if the settings differ (up to three are named, with both values), a
    training run is there, or the file system refuses.
    """
    # But for a configuration, which this command may read.
    for name in (*RUN_FILES, *RUN_FOLDERS):
        if name != CONFIG_FILE and os.path.lexists(folder / name):
            raise ConfigError(
                f"--out ({folder}) must not be the folder of a training run, but holds {name}; "
                "choose another"
            )
    file = folder / SETTINGS_FILE
    try:
        if os.path.lexists(file):
            _check_settings(folder, settings)
        for part in parts:
            (folder / part).mkdir(parents=True, exist_ok=True)
        for path, text in {file: json.dumps(settings, indent=1) + "\n", **(files or {})}.items():
            write_atomic(path, text.encode())
    except OSError as error:
        raise ConfigError(
            f"--out ({folder}) must be a folder that can be written ({error.strerror}); choose "
            "another one"
        ) from None


def _check_settings(folder: Path, wanted: Mapping[str, Any]) -> None:
    try:
        found = read_json(folder / SETTINGS_FILE)
    except ValueError:
        found = None
    if found == wanted:
        return
    # A file that is none of ours may hold anything.
    sections = found if isinstance(found, dict) else {}
    sections = {name: keys for name, keys in sections.items() if isinstance(keys, dict)}
    changed = [
        f"{section}.{key} ({before.get(key)}, now {value})"
        for section, keys in wanted.items()
        for before in [sections.get(section, {})]
        for key, value in keys.items()
        if before.get(key) != value
    ]
    raise ConfigError(
        f"--out ({folder}) must be new or hold an experiment of the same settings, and "
        f"{', '.join(changed[:3]) or 'a section'} differs in {SETTINGS_FILE}; choose another folder"
    )


@contextmanager
def _exclusive(trial: Trial[Any], path: Path) -> Iterator[None]:
    """Hold the folder of a trial, or its log, against other commands."""
    # The lock ends with the process, however that ends. Where the file system has no locks, two
    # commands can work at the same time.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDONLY | os.O_CREAT, 0o666)
    try:
        if not lock(descriptor):
            what = path.name.removesuffix(".log")
            raise ConfigError(
                f"--out ({trial.folder}) must be used by one command at a time, and "
                f"another one is at work on {what}; wait for it, or choose another folder"
            )
        yield
    finally:
        os.close(descriptor)


def _reason(log: Path, status: int) -> str:
    """Why the ranks with this `log` ended with `status`, on one line."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    # The first rank to fail is the cause of the others' failures.
    for pattern in (r"error: (.*)", r".*(Signal \d+ \(SIG\w+\))", r"(\w+Error: .*)"):
        found = re.search(rf"^(?:\[\w+\]: ?)*{pattern}", text, re.MULTILINE)
        if found is not None:
            return f"{found[1].strip()}; see {log}"
    return f"exit status {status}; see {log}"


@contextmanager
def _interruptible() -> Iterator[None]:
    """A request to stop between two trials is an `Interrupted` as well."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(status=SIGNALLED + number)

    before = {number: signal.signal(number, stop) for number in heeded_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
