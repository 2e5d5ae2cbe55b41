"""A file in a run's folder that grows by whole lines while the run trains."""

import logging
import mmap
import os
import socket
from pathlib import Path

from moepp_megatron.config import ConfigError
from moepp_megatron.observe.status import RunStatus

logger = logging.getLogger(__name__)


class LineFile:
    """Appends lines to a file of that name; if it is removed, renamed or rotated, to a new one.

    Only this process writes it, and its folder exists. Raises OSError if it cannot be opened.
    """

    def __init__(self, path: Path, start_over: bool = False) -> None:
        self.path = path
        self._fd = _open(path, os.O_TRUNC if start_over else 0)

    def append(self, lines: bytes) -> None:
        """Append lines, with their line ends, in one write, or nothing.

        Raises:
            OSError: The disk is full or gone; the file then still ends with a complete line.
            ConfigError: The folder has become another run's.
        """
        self._keep_name()
        end = os.fstat(self._fd).st_size
        written = os.write(self._fd, lines)
        if written != len(lines):
            os.ftruncate(self._fd, end)
            raise OSError(
                f"{self.path}: only {written} of {len(lines)} bytes could be written; "
                "free disk space and resume the run"
            )

    def read(self) -> bytes | mmap.mmap:
        """Map the whole file into memory; errors are `append`'s."""
        self._keep_name()
        is_empty = os.fstat(self._fd).st_size == 0
        return b"" if is_empty else mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ)

    def cut(self, size: int) -> None:
        """Drop what comes after the first `size` bytes that `read` has returned."""
        os.ftruncate(self._fd, size)

    def close(self) -> None:
        """Force the file to disk, else OSError, and close it; a second call does nothing."""
        if self._fd < 0:
            return
        descriptor, self._fd = self._fd, -1
        try:
            os.fsync(descriptor)
            if os.fstat(descriptor).st_nlink == 0:
                raise OSError(f"{self.path} was removed while the run wrote it")
        finally:
            os.close(descriptor)

    def _keep_name(self) -> None:
        """Open a new file if the name is no longer that of the file that is open."""
        try:
            if os.path.samestat(self.path.stat(), os.fstat(self._fd)):
                return
        except FileNotFoundError:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        _refuse_taken_over(self.path.parent)
        before, self._fd = self._fd, _open(self.path)
        what = "renamed" if os.fstat(before).st_nlink else "removed, with all that was in it"
        os.close(before)
        logger.error("%s was %s, while the run writes it: a new file begins", self.path, what)


def _open(path: Path, flags: int = 0) -> int:
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | flags, 0o666)


def _refuse_taken_over(run_dir: Path) -> None:
    """Raise ConfigError if this run's folder was moved away and another run has its name."""
    status, claim = RunStatus.read(run_dir), RunStatus.inherited()
    if status is None or status.state == "ended" or status.is_gone():
        return
    own_ids = {(socket.gethostname(), os.getpid())} | (
        {(claim.host, claim.pid)} if claim else set()
    )
    if (status.host, status.pid) in own_ids:
        return
    raise ConfigError(
        f"run.dir ({run_dir}) must stay this run's while it trains, and process {status.pid} on "
        f"{status.host} has taken it; this run ends here, so resume it where its folder is now"
    )
