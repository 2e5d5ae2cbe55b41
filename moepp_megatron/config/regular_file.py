"""Reads files that somebody else may have made: regular ones, and of these no more than a limit."""

from __future__ import annotations

import errno
import gzip
import os
import stat
import zlib
from pathlib import Path

_GZIP = b"\x1f\x8b"


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


def read_regular(path: Path, max_bytes: int, unpack: bool = False) -> bytes:
    """The content of a regular file.

    Args:
        path: The file, also of an object store.
        max_bytes: Limit of what is returned.
        unpack: Whether a file in gzip format is unpacked.

    Raises:
        OSError: It cannot be read, or is no regular file.
        ValueError: It has more bytes, also unpacked, or is damaged gzip data.
    """
    check_regular(path)
    with path.open("rb") as file:
        content: bytes = file.read(max_bytes + 1)
        if unpack and content.startswith(_GZIP):
            file.seek(0)
            try:
                content = gzip.GzipFile(fileobj=file).read(max_bytes + 1)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ValueError(f"its gzip data are damaged ({error})") from None
    if len(content) > max_bytes:
        raise ValueError(f"it has more than {max_bytes} bytes")
    return content
