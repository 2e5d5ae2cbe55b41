"""Appends lines to a file that others read at the same time."""

from __future__ import annotations

import os
from pathlib import Path


def append_line(fd: int, path: Path, line: bytes) -> None:
    """Appends a line in one write, or nothing.

    Args:
        fd: The file, opened with ``O_APPEND`` by its only writer.
        path: Its name, for the message.
        line: The line with its line end.

    Raises:
        OSError: If the disk is full or gone; the file then still ends with a complete line.
    """
    end = os.fstat(fd).st_size
    written = os.write(fd, line)
    if written != len(line):
        os.ftruncate(fd, end)
        raise OSError(
            f"{path}: only {written} of {len(line)} bytes could be written; "
            "free disk space and resume the run"
        )
