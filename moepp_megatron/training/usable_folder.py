"""Whether a run can write its folder, checked before ranks start."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moepp_megatron.config import Config, ConfigError
from moepp_megatron.runtime.disk import is_full
from moepp_megatron.training.run_folder import checkpoint_folder

# What a run writes there.
_FILES = ("config.yaml", "metrics.jsonl", "status.json", "alerts.jsonl")
_FOLDERS = ("checkpoints", "tensorboard", "heartbeats", "hangs")


@contextmanager
def usable(config: Config) -> Iterator[None]:
    """Create the run's folder if needed; refuse it, or a folder in it, if it cannot be written.

    Raises:
        ConfigError: If it cannot be written; names path and cause.
    """
    folder = Path(config.run.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in [*(folder / name for name in _FILES), *(folder / name for name in _FOLDERS)]:
            _check_kind(path, is_folder=path.name in _FOLDERS)
        _check_kind(checkpoint_folder(config), is_folder=True, setting="checkpoint.dir")
        yield
    except OSError as error:
        at = error.filename if isinstance(error.filename, str) else str(folder)
        where = "" if Path(at) == folder else f" at {at}"
        remedy = "make room there" if is_full(error) else "make it writable"
        raise ConfigError(
            f"run.dir ({folder}) must be a folder that can be written "
            f"({error.strerror or error}{where}); {remedy}, or choose another run.dir"
        ) from None


def _check_kind(path: Path, is_folder: bool, setting: str = "run.dir") -> None:
    place = path
    while not os.path.lexists(place):
        place = place.parent
    wrong_kind = place.is_dir() != is_folder if place == path else not place.is_dir()
    if wrong_kind:
        kind = "folder" if is_folder or place != path else "file"
        raise ConfigError(
            f"{setting} ({path.parent if setting == 'run.dir' else path}) must leave {place} to be "
            f"a {kind}, and it is none; move it away, or choose another {setting}"
        )
    needs = os.W_OK | os.X_OK if place.is_dir() else os.W_OK
    if not os.access(place, needs):
        read_only = os.statvfs(place).f_flag & os.ST_RDONLY
        code = errno.EROFS if read_only else errno.EACCES
        raise OSError(code, os.strerror(code), str(place))
