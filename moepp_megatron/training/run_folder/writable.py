"""Refuses folders of a run that cannot be written, or that machines do not share."""

from __future__ import annotations

import errno
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moepp_megatron.config import ConfigError
from moepp_megatron.file_names import RUN_FILES, RUN_FOLDERS
from moepp_megatron.runtime.disk import is_full
from moepp_megatron.training.checkpoint import NoStartError


@contextmanager
def refusing_unwritable(run: Path) -> Iterator[None]:
    """Turn an OSError in the block into the refusal of the run's folder.

    Raises:
        ConfigError: Names path and cause.
    """
    try:
        yield
    except OSError as error:
        at = error.filename if isinstance(error.filename, str) else str(run)
        where = "" if Path(at) == run else f" at {at}"
        remedy = "make room there" if is_full(error) else "make it writable"
        raise ConfigError(
            f"run.dir ({run}) must be a folder that can be written "
            f"({error.strerror or error}{where}); {remedy}, or choose another run.dir"
        ) from None


def refuse_unshared(setting: str, folder: Path, looks: bool = True) -> None:
    """Refuse a folder in which another machine does not see what rank 0 writes.

    Every rank calls it; one of each machine `looks`.

    Raises:
        NoStartError: On all ranks alike; names the first such machine.
    """
    import torch.distributed as dist

    from moepp_megatron.runtime.agreement import Agreement

    agreement, is_first = Agreement(), dist.get_rank() == 0
    # Of a new name, since network file systems remember for a while that a file is not there.
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
            f"{setting} ({folder}) must be one folder for all machines, and {blind[0]} does not "
            f"see what {hosts[0][0]} writes there; mount the same on both, or choose another one"
        )


def existing(path: Path) -> Path:
    """The path, or the nearest parent that exists."""
    return next(place for place in (path, *path.parents) if os.path.lexists(place))


def check_kinds(run: Path, checkpoints: Path, setting: str) -> None:
    """Refuse what is of another kind than a run writes, cannot be made there, or is read-only.

    Args:
        run: The run's folder.
        checkpoints: The folder of this machine that checkpoints are written to.
        setting: The setting that places it.

    Raises:
        ConfigError: Something is of another kind, or the checkpoint folder cannot be written.
        OSError: The run's folder cannot be written.
    """
    for name in RUN_FILES:
        check_kind(run / name, "file")
    for name in RUN_FOLDERS:
        check_kind(run / name, "folder")
    check_kind(checkpoints, "folder", setting)


def check_kind(path: Path, kind: str, setting: str = "run.dir") -> None:
    """Refuse a path that is of another kind than `kind`, or whose folder cannot be written.

    Raises:
        ConfigError: Names the setting that places it.
        OSError: A path within the run's folder cannot be written.
    """
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
