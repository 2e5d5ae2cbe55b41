"""The folder of a run: what is where, its configuration, and whether it can be written."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moepp_megatron.config import Config, ConfigError
from moepp_megatron.file_names import ALERTS_FILE, CONFIG_FILE, METRICS_FILE, STATUS_FILE
from moepp_megatron.runtime.atomic import write_atomic
from moepp_megatron.runtime.disk import is_full
from moepp_megatron.runtime.object_store import ObjectPath, place
from moepp_megatron.version import __version__

# What a run writes there.
RUN_FILES = (CONFIG_FILE, METRICS_FILE, STATUS_FILE, ALERTS_FILE)
RUN_FOLDERS = ("checkpoints", "tensorboard", "heartbeats", "hangs")


def checkpoint_folder(config: Config) -> Path:
    """Where the run's checkpoints are."""
    return place(config.checkpoint.folder(config.run.dir))


def staging_folder(config: Config) -> Path:
    """Where files of a checkpoint are until they are uploaded to object storage."""
    return config.checkpoint.staging or config.run.dir / "staging"


def local_checkpoint_folder(config: Config) -> Path:
    """Where this machine writes checkpoints, those too that are then uploaded."""
    folder = checkpoint_folder(config)
    return staging_folder(config) if isinstance(folder, ObjectPath) else folder


def outside_checkpoint_folder(config: Config) -> Path | None:
    """Where the run's checkpoints are if that lies outside of its folder; links are resolved.

    None for object storage too.
    """
    checkpoints = checkpoint_folder(config)
    if isinstance(checkpoints, ObjectPath) or is_inside(checkpoints, Path(config.run.dir)):
        return None
    return Path(os.path.realpath(checkpoints))


def is_same(path: Path, other: Path) -> bool:
    """Whether two paths mean the same place; links are resolved."""
    return os.path.realpath(path) == os.path.realpath(other)


def is_inside(path: Path, folder: Path) -> bool:
    """Whether `path` is the folder or lies in it; links are resolved."""
    if isinstance(path, ObjectPath):
        return False
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    return real == home or home in real.parents


def write_config(config: Config) -> Path:
    """Write `RUN/config.yaml`: the resolved configuration with version and git commit."""
    folder = Path(config.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CONFIG_FILE
    comment = f"moepp_megatron {__version__}, commit {_git_commit()}"
    write_atomic(path, config.to_yaml(comment).encode())
    return path


def _git_commit() -> str:
    """The commit of the code that runs, or `unknown` outside a repository."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


@contextmanager
def usable(config: Config) -> Iterator[None]:
    """Make the folders of run and checkpoints; what cannot be written is refused, inside too.

    Raises:
        ConfigError: If it cannot be written; names path and cause.
    """
    folder = Path(config.run.dir)
    with _refusing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _check_kinds(config)
        outside = outside_checkpoint_folder(config)
        if outside is not None:
            outside.mkdir(parents=True, exist_ok=True)
        yield


def refuse_unwritable(config: Config) -> None:
    """Refuse folders of run and checkpoints that cannot be written; makes none.

    Raises:
        ConfigError: Same as for `usable`.
    """
    folder = Path(config.run.dir)
    with _refusing(folder):
        place = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
        _check_kinds(config)


@contextmanager
def _refusing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        at = error.filename if isinstance(error.filename, str) else str(folder)
        where = "" if Path(at) == folder else f" at {at}"
        remedy = "make room there" if is_full(error) else "make it writable"
        raise ConfigError(
            f"run.dir ({folder}) must be a folder that can be written "
            f"({error.strerror or error}{where}); {remedy}, or choose another run.dir"
        ) from None


def _check_kinds(config: Config) -> None:
    for name in (*RUN_FILES, *RUN_FOLDERS):
        _check_kind(Path(config.run.dir) / name, is_folder=name in RUN_FOLDERS)
    is_far = isinstance(checkpoint_folder(config), ObjectPath)
    setting = "checkpoint.staging" if is_far else "checkpoint.dir"
    _check_kind(local_checkpoint_folder(config), is_folder=True, setting=setting)


def _check_kind(path: Path, is_folder: bool, setting: str = "run.dir") -> None:
    place = path
    while not os.path.lexists(place):
        place = place.parent
    is_right = place.is_dir() if is_folder or place != path else place.is_file()
    if not is_right:
        kind = "folder" if is_folder or place != path else "file"
        raise ConfigError(
            f"{setting} ({path.parent if setting == 'run.dir' else path}) must leave {place} to be "
            f"a {kind}, and it is none; move it away, or choose another {setting}"
        )
    needs = os.W_OK | os.X_OK if place.is_dir() else os.W_OK
    if not os.access(place, needs):
        read_only = os.statvfs(place).f_flag & os.ST_RDONLY
        code = errno.EROFS if read_only else errno.EACCES
        if setting != "run.dir":
            raise ConfigError(
                f"{setting} ({path}) must be a folder that can be written ({os.strerror(code)} at "
                f"{place}); make it writable, or choose another {setting}"
            )
        raise OSError(code, os.strerror(code), str(place))
