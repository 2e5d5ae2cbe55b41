"""Reads files that somebody else may have made: regular ones, and of these no more than a limit."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def check_regular(path: Path) -> None:
    """Refuse what is no regular file: reading a pipe or a device may block, or never end.

    Raises:
        OSError: It is not there, or no regular file.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))


def read_regular(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file, also of an object store.

    Raises:
        OSError: It cannot be read, or is no regular file.
        ValueError: It has more than `max_bytes`.
    """
    check_regular(path)
    with path.open("rb") as file:
        content: bytes = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"it has more than {max_bytes} bytes")
    return content
