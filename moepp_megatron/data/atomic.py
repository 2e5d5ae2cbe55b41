"""Writes a folder that appears complete or not at all."""

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moepp_megatron.config.errors import ConfigError, UnfitError
from moepp_megatron.runtime.disk import NO_SPACE, is_full, show_bytes

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def partial_folder(out: Path) -> Iterator[Path]:
    """An empty, locked sibling of `out` to write into; what is left of it at the end is removed.

    The next run removes the remains of a killed one; the lock distinguishes these from a
    run that is still writing.

    Args:
        out: the folder that `publish` will make of it; an absolute path.

    Raises:
        ConfigError: another process is writing `out`, or its parent cannot be written.
        UnfitError: the disk filled up in the block; what was written is removed.
    """
    partial = out.with_name(f".{out.name}.partial")
    lock = _lock(out, partial)
    try:
        for leftover in partial.iterdir():
            _remove(leftover)
        with _room_for(partial, out):
            yield partial
    finally:
        # After `publish` the name is free, or another run's.
        if _is_same_folder(partial, lock):
            shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


@contextmanager
def _room_for(partial: Path, out: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        written = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
        raise UnfitError(
            f"{out} cannot be written: {NO_SPACE} after {show_bytes(written)}, which are removed "
            "again; free space or choose another folder"
        ) from error


def publish(partial: Path, out: Path) -> None:
    """Give the finished folder its name; an older one of that name is swapped out and removed."""
    if not out.exists() or not any(out.iterdir()):
        partial.rename(out)
        return
    replaced = out.with_name(f".{out.name}.replaced-{os.getpid()}")
    if exchange(partial, out):
        partial.rename(replaced)
    else:
        # A file system without an atomic exchange: for an instant there is no such folder.
        out.rename(replaced)
        partial.rename(out)
    shutil.rmtree(replaced)


def _lock(out: Path, partial: Path) -> int:
    while True:
        try:
            partial.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue  # the run that had the lock has just finished
        except OSError as error:
            raise ConfigError(
                f"--out ({out}) cannot be written ({error.strerror}); choose another folder"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ConfigError(
                f"--out ({out}) is being written by another process; wait for it to finish"
            ) from None
        if _is_same_folder(partial, descriptor):
            return descriptor
        os.close(descriptor)


def _is_same_folder(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step (Linux `renameat2`); False where that is not possible.

    Raises:
        OSError: Either name does not exist, or the folder cannot be written.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    paths = os.fsencode(first), os.fsencode(second)
    if renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))
