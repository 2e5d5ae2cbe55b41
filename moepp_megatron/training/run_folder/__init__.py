"""The folder of a run: its layout, the check of each start, its configuration.

Decided once, before ranks start and files are written. A folder that holds a run is refused, unless
the run is resumed (`--resume`) or moved aside (`--overwrite`); nothing is ever deleted. A folder in
which a run is being trained is refused in any case. Imports no torch.

ownership.py  locks, heartbeat, mark in a checkpoint folder; unwritable folders; runs moved aside
"""

import contextlib
import errno
import os
import secrets
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from moepp_megatron.config import Config, ConfigError, load_config
from moepp_megatron.file_names import CONFIG_FILE, METRICS_FILE, RUN_FILES, RUN_FOLDERS, STATUS_FILE
from moepp_megatron.observe.status import RunStatus
from moepp_megatron.runtime.atomic import write_atomic
from moepp_megatron.runtime.disk import is_full
from moepp_megatron.runtime.object_store import ObjectPath, place
from moepp_megatron.training.checkpoint.find import NoStartError, list_checkpoints
from moepp_megatron.training.checkpoint.retention import remove_leftovers
from moepp_megatron.training.run_folder.ownership import (
    OwnerMark,
    beating,
    check_kind,
    configuration_files,
    existing,
    is_same,
    locked,
    move_aside,
    refuse_running,
)
from moepp_megatron.version import __version__


@dataclass(frozen=True)
class Start:
    """Options of starting a run.

    Attributes:
        resume, overwrite: Continue the run that is there, or move it aside.
        restarted: The same run starts again: ranks after a death, a requeued job.
        name: Name of this start, the same for all its ranks; None if no other rank reads it.
        config_file: The configuration file, which in the run's folder is no trace of a run.
    """

    resume: bool = False
    overwrite: bool = False
    restarted: bool = False
    name: str | None = None
    config_file: Path | None = None
    resume_command: str | None = None


def checkpoint_folder(config: Config) -> Path:
    """The folder of the run's checkpoints, maybe in object storage."""
    return place(config.checkpoint.folder(config.run.dir))


class RunFolder:
    """The folder of a run, `path`, with that of its checkpoints, maybe in object storage."""

    def __init__(self, config: Config) -> None:
        self.path, self.checkpoints = Path(config.run.dir), checkpoint_folder(config)
        self._config = config

    @property
    def local_checkpoints(self) -> Path:
        """Local folder for checkpoints, including those that are then uploaded."""
        if isinstance(self.checkpoints, ObjectPath):
            return self._config.checkpoint.staging_folder(self.path)
        return self.checkpoints

    @contextmanager
    def claim(self, start: Start, say: Callable[[str], object] = print) -> Iterator[None]:
        """Claim the folder for this process in the block; only the deciding process enters.

        If no run has begun inside, nothing is left behind. `say` gets what was moved where.
        ConfigError if `start` does not say what to do with a run in the folder, a run is being
        trained in it, its checkpoints are another run's, or it cannot be written.
        """
        self.refuse_occupied(start)
        folders = self._folders()
        with ExitStack() as undo:
            undo.enter_context(_empty_folders_removed(folders))
            with self._refusing_unwritable(), locked(self._made(folders)):
                if not start.restarted:
                    refuse_running(self.path)
                # Again: somebody else may have been here meanwhile.
                traces = self.refuse_occupied(start)
                mark = OwnerMark(self.path, self.checkpoints)
                mark.refuse_other()
                if start.overwrite and traces:
                    for line in move_aside(self._config, self.checkpoints, start.config_file):
                        say(line)
                    # A link to a checkpoint folder elsewhere may have been moved.
                    mark = OwnerMark(self.path, self.checkpoints)
                before = RunStatus.read(self.path)
                keeps = start.restarted and before is not None and before.is_configured
                claim = RunStatus.own(start.name, start.restarted, start.resume_command, keeps)
                added = None if mark.is_set() else mark
                undo.callback(self._withdraw, claim, before, added)
                self._write(claim, mark)
            undo.enter_context(beating(self.path, claim))
            yield

    def check_without_claim(self, start: Start) -> None:
        """Raise the ConfigError that `claim` will raise in the deciding process; for all others."""
        if start.restarted:
            return
        try:
            self.refuse_occupied(start)
        except ConfigError:
            # Looked up after the traces: the process that decides may have been here just now.
            status = RunStatus.read(self.path)
            if status is None or not _is_of_start(status, start.name):
                raise

    def refuse_occupied(self, start: Start) -> list[str]:
        """Refuse a folder with a run that `start` neither continues nor moves; looks at names only.

        Returns what of a run is there, as `traces` does. ConfigError if there is a run, or the
        folder is a repository's or that of configurations.
        """
        if start.resume and start.overwrite:
            raise ConfigError(
                "--resume and --overwrite must not be given together; --resume continues the "
                "run, --overwrite moves it aside and starts from scratch"
            )
        traces = self.traces(start.config_file)
        if not start.restarted and (start.overwrite or not traces):
            self._refuse_other_use(start.config_file)
        if start.restarted or start.overwrite or not traces:
            return traces
        if not start.resume:
            raise ConfigError(
                f"run.dir ({self.path}) must not hold a run, and has {', '.join(traces)}; add "
                "--resume to continue it, or --overwrite to move it aside and start from scratch"
            )
        status = RunStatus.read(self.path)
        ended = status is not None and status.state == "ended"
        if ended and METRICS_FILE in traces and not list_checkpoints(self.checkpoints):
            raise ConfigError(
                f"run.dir ({self.path}) must have a checkpoint for --resume, and its run has ended "
                "without one; use --overwrite to move it aside and start from scratch"
            )
        return traces

    def _refuse_other_use(self, config_file: Path | None) -> None:
        found = [".git"] if os.path.lexists(self.path / ".git") else []
        for file in map(Path, sorted(configuration_files(config_file))):
            # Its own, from which it may start anew.
            if is_same(file.parent, self.path) and file.name != CONFIG_FILE:
                found.append(file.name)
        if found:
            raise ConfigError(
                f"run.dir ({self.path}) must be a folder for only the run, and holds "
                f"{', '.join(found)}; choose a folder in it, such as {self.path / 'runs' / 'first'}"
            )

    def traces(self, config_file: Path | None) -> list[str]:
        """Names of a run's files in its folder and of its checkpoints, for a message."""
        names = [
            name
            for name in RUN_FILES
            if os.path.lexists(self.path / name)
            and not (config_file is not None and is_same(self.path / name, config_file))
        ]
        if list_checkpoints(self.checkpoints):
            inside = self.checkpoints == self.path / "checkpoints"
            names.append("checkpoints" if inside else f"the checkpoints in {self.checkpoints}")
        return names

    def is_requeued(self, name: str | None) -> bool:
        """True if this is a requeued Slurm job whose run is in the folder; `name` as in `Start`."""
        if (
            int(os.environ.get("SLURM_RESTART_COUNT") or 0) == 0
            or RunStatus.inherited() is not None
        ):
            return False
        status = RunStatus.read(self.path)
        if status is None:
            return False
        if name is not None and _is_of_start(status, name):
            # The process that decides has found out before this one looked.
            return status.restarted
        return status.job == os.environ.get("SLURM_JOB_ID")

    def begun(self) -> Config | None:
        """The configuration with which the run that claimed the folder trains; None before that."""
        status, file = RunStatus.read(self.path), self.path / CONFIG_FILE
        is_there = status is not None and status.is_configured and file.is_file()
        return load_config(file) if is_there else None

    def write_config(self) -> None:
        """Write `RUN/config.yaml`: the resolved configuration with version and git commit."""
        self.path.mkdir(parents=True, exist_ok=True)
        comment = f"moepp_megatron {__version__}, commit {_git_commit()}"
        write_atomic(self.path / CONFIG_FILE, self._config.to_yaml(comment).encode())

    def refuse_unwritable(self) -> None:
        """Refuse (ConfigError) folders that cannot be written, with path and cause; makes none."""
        with self._refusing_unwritable():
            if not (nearest := existing(self.path)).is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(nearest))
            self._check_kinds()

    def refuse_unshared(self, looks: bool) -> None:
        """Refuse folders in which another machine does not see what rank 0 writes.

        With checkpoints in object storage each machine may have a folder of its own. Every rank
        calls it; one of each machine `looks`. NoStartError on all ranks alike.
        """
        import torch.distributed as dist

        from moepp_megatron.runtime.distributed import Agreement

        if isinstance(self.checkpoints, ObjectPath):
            return
        agreement, is_first = Agreement(), dist.get_rank() == 0
        for folder, setting in zip(self._folders(), ("run.dir", "checkpoint.dir"), strict=False):
            # New, since network file systems remember for a while that a file is not there.
            name = f".shared-{secrets.token_hex(8)}"
            if is_first:
                (folder / name).touch()
            mark = folder / agreement.from_first(name)
            hosts = agreement.gather((socket.gethostname(), not looks or mark.exists()))
            if is_first:
                mark.unlink()
            blind = [host for host, sees in hosts if not sees]
            if blind:
                raise NoStartError(
                    f"{setting} ({folder}) must be one folder for all machines, and {blind[0]} "
                    f"does not see what {hosts[0][0]} writes there; mount the same on both, or "
                    "choose another one"
                )

    def _folders(self) -> list[Path]:
        """The folders that a run has for itself: its own, and that of its checkpoints elsewhere."""
        outside = OwnerMark(self.path, self.checkpoints).outside
        return [self.path, *([] if outside is None else [outside])]

    def _made(self, folders: list[Path]) -> list[Path]:
        """The same, created where missing."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._check_kinds()
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        return folders

    def _check_kinds(self) -> None:
        """Refuse what is of another kind than a run writes, cannot be made, or is read-only."""
        for name in RUN_FILES:
            check_kind(self.path / name, "file")
        for name in RUN_FOLDERS:
            check_kind(self.path / name, "folder")
        is_far = isinstance(self.checkpoints, ObjectPath)
        setting = "checkpoint.staging" if is_far else "checkpoint.dir"
        check_kind(self.local_checkpoints, "folder", setting)

    @contextmanager
    def _refusing_unwritable(self) -> Iterator[None]:
        """Turn an OSError in the block into a ConfigError that names the folder and the cause."""
        try:
            yield
        except OSError as error:
            at = error.filename if isinstance(error.filename, str) else str(self.path)
            where = "" if Path(at) == self.path else f" at {at}"
            remedy = "make room there" if is_full(error) else "make it writable"
            raise ConfigError(
                f"run.dir ({self.path}) must be a folder that can be written "
                f"({error.strerror or error}{where}); {remedy}, or choose another run.dir"
            ) from None

    def _write(self, claim: RunStatus, mark: OwnerMark) -> None:
        try:
            self._write_claim(claim, mark)
        except OSError as error:
            if not is_full(error):
                raise
            # Nobody else trains here, so half-written checkpoints are nobody's.
            remove_leftovers(self.local_checkpoints)
            self._write_claim(claim, mark)

    def _write_claim(self, claim: RunStatus, mark: OwnerMark) -> None:
        claim.write(self.path)
        try:
            mark.set()
        except FileExistsError:
            # Without locks: another run has been faster.
            mark.refuse_other()
            raise

    def _withdraw(
        self, claim: RunStatus, previous: RunStatus | None, mark: OwnerMark | None
    ) -> None:
        """Remove the files of a start that did not become a run."""
        if RunStatus.read(self.path) != claim:
            return
        if mark is not None:
            mark.remove()
        with contextlib.suppress(OSError):
            if previous is not None:
                previous.write(self.path)
            else:
                (self.path / STATUS_FILE).unlink()


@contextmanager
def _empty_folders_removed(folders: list[Path]) -> Iterator[None]:
    """Folders that were not there before are removed at the end if they are empty."""
    paths = [each for path in folders for each in (path, *path.parents)]
    new = [path for path in paths if not os.path.lexists(path)]
    try:
        yield
    finally:
        for path in new:
            with contextlib.suppress(OSError):
                path.rmdir()


def _is_of_start(status: RunStatus, name: str | None) -> bool:
    return status.state == "running" and name is not None and status.start == name


def _git_commit() -> str:
    """The commit of the code that runs, or `unknown` outside a repository."""
    command, folder = ["git", "rev-parse", "HEAD"], Path(__file__).parent
    try:
        return subprocess.check_output(
            command, cwd=folder, stderr=subprocess.DEVNULL, text=True, timeout=10
        ).strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
