"""Writes files and folders that readers see whole or not at all."""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moepp_megatron.config.errors import ConfigError, UnfitError
from moepp_megatron.runtime.disk import NO_SPACE, is_full, show_bytes, write_error

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def write_atomic(path: Path, content: bytes, *, is_synced: bool = True) -> None:
    """Replace `path` by `content` in one step; arguments and errors are `whole_file`'s."""
    with whole_file(path, is_synced=is_synced) as temporary:
        temporary.write_bytes(content)


def create_atomic(path: Path, content: bytes) -> None:
    """Make `path` in one step; of several processes that do so at once, one succeeds.

    On a file system without hard links the last one does. FileExistsError if it exists already,
    OSError as `write_atomic`.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        write_synced(temporary, content)
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOSYS, errno.ENOTSUP):
            raise
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_result(path: Path, content: bytes) -> None:
    """Same as `write_atomic`, for a file that a user has named: make missing folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON to a file that a user has named."""
    write_result(path, (json.dumps(value, indent=1) + "\n").encode())


@contextmanager
def whole_file(path: Path, *, is_synced: bool = True) -> Iterator[Path]:
    """A hidden name in the same folder to write to; at the end the file gets the name `path`.

    `is_synced` waits until the content is on disk, so that a power cut leaves no empty file; a file
    that is written every second and read at once does without. OSError if the folder is missing,
    full or not writable; `path` is then as before.
    """
    # Some writers go by the suffix.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        if is_synced:
            sync(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and is_full(error):
            # A write knows no name, and this one has ended.
            raise write_error(error, path) from None
        raise


def write_synced(path: Path, content: bytes) -> None:
    """Write a file of a folder that has no name yet, and force it to disk."""
    path.write_bytes(content)
    sync(path)


def sync(path: Path) -> None:
    """Force a file's content, or a folder's entries (a rename among them), to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def partial_folder(out: Path, name: str = "--out") -> Iterator[Path]:
    """An empty, locked sibling of `out` to write into; what is left of it at the end is removed.

    The next run removes the remains of a killed one, which the lock distinguishes from a run that
    still writes. `publish` makes an absolute path `out` of it; the user knows that as `name`.

    Raises:
        ConfigError: Another process is writing `out`, or its parent cannot be written.
        UnfitError: The disk filled up in the block; what was written is removed.
    """
    partial = out.with_name(f".{out.name}.partial")
    descriptor = _locked(out, partial, name)
    try:
        for leftover in partial.iterdir():
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
        with _room_for(partial, out):
            yield partial
    finally:
        # After `publish` the name is free, or another run's.
        if _is_same_folder(partial, descriptor):
            shutil.rmtree(partial, ignore_errors=True)
        os.close(descriptor)


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


def _locked(out: Path, partial: Path, name: str) -> int:
    while True:
        try:
            partial.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue  # the run that had the lock has just finished
        except OSError as error:
            raise ConfigError(
                f"{name} ({out}) cannot be written ({error.strerror}); choose another folder"
            ) from error
        if not lock(descriptor):
            os.close(descriptor)
            raise ConfigError(
                f"{name} ({out}) is being written by another process; wait for it to finish"
            )
        if _is_same_folder(partial, descriptor):
            return descriptor
        os.close(descriptor)


def lock(descriptor: int, *, waits: bool = False) -> bool:
    """Lock an open file or folder against other processes until it is closed.

    False where another process holds it and `waits` is false. True also on a file system without
    locks (some mounts of Lustre and NFS), where two processes can work at the same time.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _is_same_folder(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step (Linux `renameat2`); False where that is not possible.

    OSError if either name does not exist, or the folder cannot be written.
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
