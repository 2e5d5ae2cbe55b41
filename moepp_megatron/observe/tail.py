"""Reads new lines of a file that another process appends to and sometimes rewrites."""

import os
from pathlib import Path
from typing import NamedTuple

from moepp_megatron.config.regular_file import check_regular
from moepp_megatron.observe.metrics import LONGEST_LINE

# What a poll reads at once; a file far longer is read by several.
CHUNK = 1 << 22
# The end of what was read, kept to see whether it still stands there.
FINGERPRINT = 256


class _NewLines(NamedTuple):
    """Whole lines; `rewritten`: the file was replaced or cut, and earlier lines are void."""

    rewritten: bool
    lines: list[bytes]


class Tail:
    """Reads a growing file of lines, each byte once.

    A line counts once it has its line end. Resuming a run replaces or cuts its files; this is
    detected by the file's identity, its length, and the bytes before the present position.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._identity: tuple[int, int] | None = None
        self._fingerprint = b""

    @property
    def mtime(self) -> float | None:
        """Time of the file's last change, seconds since 1970; None if there is no file."""
        try:
            return self._path.stat().st_mtime
        except OSError:
            return None

    def poll(self) -> _NewLines:
        """Return new lines, some MiB at most; raise OSError if an existing file is unreadable."""
        try:
            check_regular(self._path)
            fd = os.open(self._path, os.O_RDONLY)
        except FileNotFoundError:
            return _NewLines(self._forget(None), [])
        try:
            stat = os.fstat(fd)
            identity = (stat.st_dev, stat.st_ino)
            rewritten = not self._still_holds(fd, identity) and self._forget(identity)
            self._identity = identity
            return _NewLines(rewritten, self._read(fd))
        finally:
            os.close(fd)

    def _still_holds(self, fd: int, identity: tuple[int, int]) -> bool:
        """True if the bytes read so far are still the beginning of the file."""
        start = self._offset - len(self._fingerprint)
        return (
            identity == self._identity
            and os.pread(fd, len(self._fingerprint), start) == self._fingerprint
        )

    def _forget(self, identity: tuple[int, int] | None) -> bool:
        """Start at the beginning; returns whether anything had been read."""
        had_read = self._offset > 0
        self._offset, self._identity, self._fingerprint = 0, identity, b""
        return had_read

    def _read(self, fd: int) -> list[bytes]:
        rest = b""
        while piece := os.pread(fd, CHUNK, self._offset + len(rest)):
            rest += piece
            end = rest.rfind(b"\n") + 1 or (len(rest) if len(rest) >= LONGEST_LINE else 0)
            if end:
                self._fingerprint = (self._fingerprint + rest[:end])[-FINGERPRINT:]
                self._offset += end
                return rest[:end].removesuffix(b"\n").split(b"\n")
        return []
