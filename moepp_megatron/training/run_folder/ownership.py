"""Ownership of a run's folder, and of a checkpoint folder outside of it; how a new run takes them.

The process that holds a run's folder touches `RUN/status.json` every `BEAT_S` seconds, by which
other machines see that it lives.

A checkpoint folder outside of its run's is marked with the file `owner`, which names the run's
folder: two runs in one would delete and continue each other's checkpoints. A mark counts while that
folder has a `status.json`: a run that was renamed or deleted owns nothing under its old name.
"""

import contextlib
import errno
import itertools
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moepp_megatron.config import Config, ConfigError, load_config
from moepp_megatron.config.load import config_layers
from moepp_megatron.config.sections import used
from moepp_megatron.file_names import CONFIG_FILE, LATEST_FILE, OWNER_FILE, STATUS_FILE, is_of_run
from moepp_megatron.observe.status import CLAIM, RunStatus
from moepp_megatron.runtime.atomic import create_atomic, lock, write_atomic
from moepp_megatron.runtime.object_store import ObjectPath
from moepp_megatron.runtime.rank import environment
from moepp_megatron.training.checkpoint.files import PREFIX
from moepp_megatron.training.checkpoint.find import checkpoints_of, list_checkpoints

BEAT_S = 3.0
# How long a process on another machine may show no beat: it may be busy, its disk slow.
SILENT_S = 4 * BEAT_S
# A file that is older has no process behind it, whatever the clocks of two machines say.
_OLD_S = 3600.0


def is_same(path: Path, other: Path) -> bool:
    """True if two paths are the same once links are resolved."""
    return os.path.realpath(path) == os.path.realpath(other)


def _is_inside(path: Path, folder: Path) -> bool:
    """True if `path` is the folder or lies in it; links are resolved."""
    if isinstance(path, ObjectPath):
        return False
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    return real == home or home in real.parents


def refuse_running(folder: Path) -> None:
    """Refuse (ConfigError) a folder in which a run is being trained; names process and machine."""
    status = RunStatus.read(folder)
    if status is None or status.state == "ended":
        return
    gone = status.is_gone()
    if gone is None:
        gone = _is_silent(folder / STATUS_FILE)
    if not gone:
        since = _when(status.started)
        owner = status.launcher.pid if status.launcher is not None else status.pid
        raise ConfigError(
            f"run.dir ({folder}) must not be in use, and process {owner} on {status.host} trains "
            f"in it since {since}; stop that one first, or choose another run.dir"
        )


def _when(seconds: float) -> str:
    """Seconds since 1970 in this machine's time zone; a damaged file may hold any number."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return f"{seconds:g} s after 1970"


@contextmanager
def locked(folders: Iterable[Path]) -> Iterator[None]:
    """Lock the folders in the block, so that one process at a time checks and claims them."""
    # Where the file system cannot lock a folder (NFS), two that start within the same instant may
    # both be let into a run's folder.
    with contextlib.ExitStack() as locks:
        # In an order that is the same for all, so that no two wait for each other.
        for folder in sorted({os.path.realpath(folder) for folder in folders}):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            locks.callback(os.close, descriptor)
            lock(descriptor, waits=True)
        yield


@contextmanager
def beating(folder: Path, claim: RunStatus) -> Iterator[None]:
    """Context: started ranks know the claim, and other machines see its heartbeat."""
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(folder, stop), name="claim", daemon=True)
    beat.start()
    try:
        with environment(**{CLAIM: claim.model_dump_json()}):
            yield
    finally:
        stop.set()
        beat.join()


def _beat(folder: Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT_S):
        with contextlib.suppress(OSError):
            os.utime(folder / STATUS_FILE)


def _is_silent(path: Path) -> bool:
    """True if no process touches the file; only changes count, as machines' clocks differ."""
    first = _touched(path)
    if first is None or time.time() - first / 1e9 > _OLD_S:
        return True
    deadline = time.monotonic() + SILENT_S
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


class OwnerMark:
    """The mark of a run in its checkpoint folder `outside` of the run's own (links resolved).

    `outside` is None, without a mark, for checkpoints in the run's folder or in object storage.
    """

    def __init__(self, run: Path, checkpoints: Path) -> None:
        self._run, self._checkpoints = run, checkpoints
        is_elsewhere = not (isinstance(checkpoints, ObjectPath) or _is_inside(checkpoints, run))
        self.outside = Path(os.path.realpath(checkpoints)) if is_elsewhere else None

    @staticmethod
    def named(checkpoints: Path) -> Path | None:
        """The run's folder that a checkpoint folder's mark names; None without one that counts."""
        try:
            owner = Path(os.fsdecode((checkpoints / OWNER_FILE).read_bytes()).removesuffix("\n"))
        except OSError:
            return None
        return owner if owner.is_absolute() and (owner / STATUS_FILE).is_file() else None

    def is_set(self) -> bool:
        """True if the run has marked the folder."""
        marked = None if self.outside is None else self.named(self.outside)
        return marked is not None and is_same(marked, self._run)

    def refuse_other(self) -> None:
        """Refuse (ConfigError) a checkpoint folder of another run, whose folder it names."""
        owner = self._owner()
        if owner is not None and not is_same(owner, self._run):
            raise ConfigError(
                f"checkpoint.dir ({self._checkpoints}) must not hold checkpoints of another "
                f"run, and has those of {owner}; choose another checkpoint.dir"
            )

    def set(self) -> None:
        """Mark the folder, once the run's own has `status.json`; FileExistsError if another has."""
        if self.outside is None or self.is_set():
            return
        mark = self.outside / OWNER_FILE
        if mark.exists() and self.named(self.outside) is None:
            mark.unlink()
        create_atomic(mark, _content(self._run))

    def remove(self) -> None:
        """Remove the mark if it is the run's own."""
        if self.outside is not None and self.is_set():
            with contextlib.suppress(OSError):
                (self.outside / OWNER_FILE).unlink()

    def carry(self, checkpoints: Path | None, run: Path) -> None:
        """Take the mark along to where the run and its checkpoints, if it has any, are now."""
        if self.outside is None:
            return
        (self.outside / OWNER_FILE).unlink(missing_ok=True)
        if checkpoints is not None:
            write_atomic(checkpoints / OWNER_FILE, _content(run))

    def _owner(self) -> Path | None:
        """The folder of the run whose checkpoints are outside of this one's, if that run exists."""
        checkpoints = self._checkpoints
        if _is_inside(checkpoints, self._run):
            return None
        if self.outside is not None:
            marked = self.named(self.outside)
            if marked is not None:
                return marked
            # Of a run that has not saved yet, too.
            if (
                checkpoints.name == "checkpoints"
                and RunStatus.read(self.outside.parent) is not None
            ):
                return self.outside.parent
        for checkpoint in list_checkpoints(checkpoints):
            try:
                owner = Path(load_config(checkpoint / CONFIG_FILE).run.dir)
            except ConfigError:
                continue
            # A run that was renamed has no folder of its old name.
            return owner if (owner / CONFIG_FILE).is_file() else None
        return None


def _content(run: Path) -> bytes:
    return os.fsencode(os.path.realpath(run)) + b"\n"


def existing(path: Path) -> Path:
    """The path, or the nearest parent that exists."""
    return next(place for place in (path, *path.parents) if os.path.lexists(place))


def check_kind(path: Path, kind: str, setting: str = "run.dir") -> None:
    """Refuse (ConfigError) a path that is no `kind` or not writable (OSError in a run's folder)."""
    place = existing(path)
    kind = kind if place == path else "folder"
    if not (place.is_dir() if kind == "folder" else place.is_file()):
        raise ConfigError(
            f"{setting} ({path.parent if setting == 'run.dir' else path}) must leave {place} to be "
            f"a {kind}, and it is none; move it away, or choose another {setting}"
        )
    needs = os.W_OK | os.X_OK if place.is_dir() else os.W_OK
    if os.access(place, needs):
        return
    code = errno.EROFS if os.statvfs(place).f_flag & os.ST_RDONLY else errno.EACCES
    if setting == "run.dir":
        raise OSError(code, os.strerror(code), str(place))
    raise ConfigError(
        f"{setting} ({path}) must be a folder that can be written ({os.strerror(code)} at "
        f"{place}); make it writable, or choose another {setting}"
    )


def move_aside(config: Config, checkpoints: Path, config_file: Path | None) -> list[str]:
    """Move the files of a run to a new folder next to its own, named by date and time.

    Files that no run writes and folders with other runs are left, as is Slurm's output, which the
    new run may be writing, and `config_file` with its bases; of config.yaml, a record of the run
    too, a copy is moved. Checkpoints outside of the run's folder get a neighbour of their own, so
    that nothing is copied. Returns a line for each new folder. ConfigError if `checkpoint.load` or
    the teacher would be moved, or checkpoints are in object storage; OSError if the folder's parent
    cannot be written.
    """
    folder = Path(config.run.dir)
    if isinstance(checkpoints, ObjectPath) and list_checkpoints(checkpoints):
        raise ConfigError(
            f"checkpoint.dir ({checkpoints}) must hold no checkpoints for --overwrite, since "
            "nothing can be moved in object storage; choose another checkpoint.dir, or delete them"
        )
    ours = configuration_files(config_file)
    named = (checkpoints, *(value for _, value in used(config, "output")))
    written = {os.path.realpath(path) for path in named if not isinstance(path, ObjectPath | None)}
    moved = [
        path
        for path in sorted(folder.iterdir())
        if (is_of_run(path.name) or os.path.realpath(path) in written)
        and not _holds_runs(path, folder)
    ]
    # Before a link to it is moved.
    mark = OwnerMark(folder, checkpoints)
    old = _left_checkpoints(checkpoints, folder, moved)
    _refuse_moved_start(config, [*moved, *old])
    lines, place = [], None
    if old:
        place = _move(old, old[0].parent)
        lines.append(f"moved the checkpoints of before to {place}")
    if moved:
        keeps_config = os.path.realpath(folder / CONFIG_FILE) in ours
        if keeps_config:
            moved.remove(folder / CONFIG_FILE)
        target = _move(moved, folder)
        if keeps_config:
            shutil.copy2(folder / CONFIG_FILE, target / CONFIG_FILE)
        lines.append(f"moved the run of before to {target}")
        mark.carry(place, target)
    return lines


def configuration_files(config_file: Path | None) -> set[str]:
    """The configuration's file and its bases, which each rank reads; links are resolved."""
    # Not of a pipe, which can be read once.
    if config_file is None or not config_file.is_file():
        return set()
    return {os.path.realpath(path) for path, _ in config_layers(config_file)}


def _left_checkpoints(checkpoints: Path, folder: Path, moved: list[Path]) -> list[Path]:
    """The run's checkpoints that are in none of what is moved from its folder."""
    real, home = Path(os.path.realpath(checkpoints)), Path(os.path.realpath(folder))
    if isinstance(checkpoints, ObjectPath) or not real.is_dir():
        return []
    gone = {home / path.name for path in moved}
    return [
        path
        for path in sorted(real.iterdir())
        if (path.name == LATEST_FILE or path.name.lstrip(".").startswith(PREFIX))
        and gone.isdisjoint((path, *path.parents))
    ]


def _holds_runs(path: Path, run: Path) -> bool:
    """True if a folder of the run's has other runs, or checkpoints of some."""
    if any(path.rglob(STATUS_FILE)):
        return True
    owners = {OwnerMark.named(mark.parent) for mark in path.rglob(OWNER_FILE)}
    return not all(is_same(owner, run) for owner in owners if owner)


def _refuse_moved_start(config: Config, moved: list[Path]) -> None:
    load = ("checkpoint.load", config.checkpoint.load)
    for setting, name in (load, *used(config, "checkpoint")):
        if name is None or name == "auto":
            continue
        candidates = checkpoints_of(name, Path(os.path.abspath(config.run.dir)))
        if any(_is_inside(path, each) for path in candidates for each in moved):
            raise ConfigError(
                f"{setting} ({name}) must not be in the run that --overwrite moves aside; choose "
                "another run.dir"
            )


def _move(paths: list[Path], folder: Path) -> Path:
    """Move to a new neighbour of `folder`."""
    folder = folder.absolute()
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for number in itertools.count(1):
        suffix = stamp if number == 1 else f"{stamp}-{number}"
        target = folder.with_name(f"{folder.name}.{suffix}")
        try:
            target.mkdir()
            break
        except FileExistsError:
            continue
    for path in paths:
        os.rename(path, target / path.name)
    return target
