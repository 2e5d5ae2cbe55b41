"""Whether a run may start in its folder: decided once, before ranks start and files are written.

A folder that holds a run is refused, unless the run goes on (`--resume`) or is moved aside
(`--overwrite`); nothing is ever deleted. A folder in which a run is being trained is refused in any
case. Whoever is let in claims the folder: it writes `RUN/status.json` and touches it every
`BEAT_S` seconds, by which other machines see that it lives, and marks a checkpoint folder elsewhere
(`checkpoint_owner`). Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moepp_megatron.config import Config, ConfigError
from moepp_megatron.file_names import CONFIG_FILE, METRICS_FILE, STATUS_FILE
from moepp_megatron.observe.status import (
    CLAIM,
    RunStatus,
    inherited_claim,
    read_status,
    write_status,
)
from moepp_megatron.runtime.atomic import lock
from moepp_megatron.runtime.disk import is_full
from moepp_megatron.training.checkpoint import list_checkpoints
from moepp_megatron.training.checkpoint.room import remove_leftovers
from moepp_megatron.training.checkpoint_owner import (
    is_marked,
    mark_checkpoints,
    refuse_other_owner,
    remove_mark,
)
from moepp_megatron.training.move_aside import move_aside
from moepp_megatron.training.run_folder import (
    checkpoint_folder,
    is_same,
    local_checkpoint_folder,
    outside_checkpoint_folder,
    usable,
)

BEAT_S = 3.0
# How long a process on another machine may show no beat: it may be busy, its disk slow.
_SILENT_S = 4 * BEAT_S
# A file that is older has no process behind it, whatever the clocks of two machines say.
_OLD_S = 3600.0

# What a run leaves in its folder, beside checkpoints.
_TRACES = (CONFIG_FILE, METRICS_FILE, STATUS_FILE)


@dataclass(frozen=True)
class Start:
    """How somebody wants to start a run.

    Attributes:
        resume: Go on with what is there.
        overwrite: Move aside what is there.
        restarted: The same run starts again: ranks after a death, a requeued job.
        name: Name of this start, the same for all its ranks; None if no other rank reads it.
        config_file: The configuration file; one that is in the run's folder does not count as part
            of a run.
        go_on: The command that goes on with the run.
    """

    resume: bool = False
    overwrite: bool = False
    restarted: bool = False
    name: str | None = None
    config_file: Path | None = None
    go_on: str | None = None


def is_claimed() -> bool:
    """Whether the launcher of this rank has claimed the folder, so that all is decided."""
    return inherited_claim() is not None


def is_requeued(config: Config, name: str | None) -> bool:
    """Whether this is a Slurm job that starts again, and the run in the folder is its own.

    Args:
        config: The run's configuration.
        name: Name of this start, as in `Start`.
    """
    if int(os.environ.get("SLURM_RESTART_COUNT") or 0) == 0 or is_claimed():
        return False
    status = read_status(Path(config.run.dir))
    if status is None:
        return False
    if name is not None and _is_of_start(status, name):
        # The process that decides has found out before this one looked.
        return status.restarted
    return status.job == os.environ.get("SLURM_JOB_ID")


def check_beside_leader(config: Config, start: Start) -> None:
    """Refuse what the deciding process will refuse; for the other ranks and machines.

    Raises:
        ConfigError: Same as for `claimed`.
    """
    if start.restarted:
        return
    try:
        refuse_occupied(config, start)
    except ConfigError:
        # Looked up after the traces: the process that decides may have been here, even just now.
        status = read_status(Path(config.run.dir))
        if status is None or not _is_of_start(status, start.name):
            raise


@contextmanager
def claimed(config: Config, start: Start, say: Callable[[str], object] = print) -> Iterator[None]:
    """A context in which this process owns the run's folder; only the deciding process enters.

    If no run has begun inside, nothing is left behind.

    Args:
        config: The run's configuration.
        start: How the user wants to start.
        say: Called with what was moved where.

    Raises:
        ConfigError: The folder holds a run and neither way is chosen, a run is being trained in it,
            its checkpoints are another run's, or it cannot be written.
    """
    folder = Path(config.run.dir)
    refuse_occupied(config, start)
    with contextlib.ExitStack() as undo:
        undo.enter_context(_empty_folders_removed(config))
        with usable(config), _one_at_a_time(config):
            if not start.restarted:
                refuse_running(folder)
            # Again: somebody else may have been here meanwhile.
            refuse_occupied(config, start)
            refuse_other_owner(config)
            if start.overwrite and not start.restarted and traces(config, start.config_file):
                for line in move_aside(config, start.config_file):
                    say(line)
            claim = RunStatus.own(start.name, start.restarted, start.go_on)
            undo.callback(_withdraw, config, claim, read_status(folder), is_marked(config))
            _write(config, claim)
        undo.enter_context(_shown(folder, claim))
        yield


def refuse_running(folder: Path) -> None:
    """Refuse a folder in which a run is being trained.

    Raises:
        ConfigError: If one is; names process and machine.
    """
    status = read_status(folder)
    if status is None or status.state == "ended":
        return
    gone = status.is_gone()
    if gone is None:
        gone = _is_silent(folder / STATUS_FILE)
    if not gone:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status.started))
        owner = status.launcher.pid if status.launcher is not None else status.pid
        raise ConfigError(
            f"run.dir ({folder}) must not be in use, and process {owner} on {status.host} trains "
            f"in it since {since}; stop that one first, or choose another run.dir"
        )


def refuse_occupied(config: Config, start: Start) -> None:
    """Refuse a folder with a run for which neither way is chosen; looks at names only.

    Raises:
        ConfigError: If there is one; says what is there and both ways.
    """
    if start.resume and start.overwrite and not start.restarted:
        raise ConfigError(
            "--resume and --overwrite must not be given together; --resume goes on with the run, "
            "--overwrite moves it aside and starts anew"
        )
    found = traces(config, start.config_file)
    if start.restarted or start.overwrite or not found:
        return
    folder = Path(config.run.dir)
    if not start.resume:
        raise ConfigError(
            f"run.dir ({folder}) must not hold a run, and has {', '.join(found)}; add --resume to "
            "go on with it, or --overwrite to move it aside and start anew"
        )
    status = read_status(folder)
    ended = status is not None and status.state == "ended"
    if ended and METRICS_FILE in found and not list_checkpoints(checkpoint_folder(config)):
        raise ConfigError(
            f"run.dir ({folder}) must have a checkpoint for --resume, and its run has ended "
            "without one; use --overwrite to move it aside and start anew"
        )


def traces(config: Config, config_file: Path | None = None) -> list[str]:
    """Names of a run's files in its folder and of its checkpoints, for a message."""
    folder = Path(config.run.dir)
    found = [
        name
        for name in _TRACES
        if os.path.lexists(folder / name)
        and not (config_file is not None and is_same(folder / name, config_file))
    ]
    checkpoints = checkpoint_folder(config)
    if list_checkpoints(checkpoints):
        inside = checkpoints == folder / "checkpoints"
        found.append("checkpoints" if inside else f"the checkpoints in {checkpoints}")
    return found


def _is_silent(path: Path) -> bool:
    """Whether no process touches the file. Only changes count, because machines' clocks differ."""
    first = _touched(path)
    if first is None or time.time() - first / 1e9 > _OLD_S:
        return True
    deadline = time.monotonic() + _SILENT_S
    while time.monotonic() < deadline:
        time.sleep(0.2)
        if _touched(path) != first:
            return False
    return True


def _touched(path: Path) -> int | None:
    try:
        # Opened, since network file systems then ask the server.
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _beat(folder: Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT_S):
        with contextlib.suppress(OSError):
            os.utime(folder / STATUS_FILE)


@contextmanager
def _shown(folder: Path, claim: RunStatus) -> Iterator[None]:
    """Ranks that are started inside know the claim, and other machines see that it lives."""
    before = os.environ.get(CLAIM)
    os.environ[CLAIM] = claim.model_dump_json()
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(folder, stop), name="claim", daemon=True)
    beat.start()
    try:
        yield
    finally:
        stop.set()
        beat.join()
        os.environ.pop(CLAIM)
        if before is not None:
            os.environ[CLAIM] = before


def _folders(config: Config) -> list[Path]:
    """The folders that a run has for itself: its own, and that of its checkpoints elsewhere."""
    outside = outside_checkpoint_folder(config)
    return [Path(config.run.dir), *([] if outside is None else [outside])]


@contextmanager
def _one_at_a_time(config: Config) -> Iterator[None]:
    """Locks, so that of two processes one checks and claims the folders before the other."""
    # Where the file system cannot lock a folder (NFS), two that start within the same instant may
    # both be let into a run's folder.
    with contextlib.ExitStack() as locks:
        # In an order that is the same for all, so that no two wait for each other.
        for folder in sorted({os.path.realpath(folder) for folder in _folders(config)}):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            locks.callback(os.close, descriptor)
            lock(descriptor, waits=True)
        yield


@contextmanager
def _empty_folders_removed(config: Config) -> Iterator[None]:
    """Folders of the run that were not there before are removed at the end if they are empty."""
    paths = [each for path in _folders(config) for each in (path, *path.parents)]
    new = [path for path in paths if not os.path.lexists(path)]
    try:
        yield
    finally:
        for path in new:
            with contextlib.suppress(OSError):
                path.rmdir()


def _write(config: Config, claim: RunStatus) -> None:
    try:
        _write_claim(config, claim)
    except OSError as error:
        if not is_full(error):
            raise
        # Nobody else trains here, so half-written checkpoints are nobody's.
        remove_leftovers(local_checkpoint_folder(config))
        _write_claim(config, claim)


def _write_claim(config: Config, claim: RunStatus) -> None:
    write_status(Path(config.run.dir), claim)
    try:
        mark_checkpoints(config)
    except FileExistsError:
        # Without locks: another run has been faster.
        refuse_other_owner(config)
        raise


def _withdraw(
    config: Config, claim: RunStatus, previous: RunStatus | None, was_marked: bool
) -> None:
    """Remove the files of a start that did not become a run."""
    folder = Path(config.run.dir)
    if read_status(folder) != claim:
        return
    if not was_marked:
        remove_mark(config)
    with contextlib.suppress(OSError):
        if previous is not None:
            write_status(folder, previous)
            return
        (folder / STATUS_FILE).unlink()


def _is_of_start(status: RunStatus, name: str | None) -> bool:
    return status.state == "running" and name is not None and status.start == name
