"""A forked process that runs one function while the rank continues to train.

Forked, not spawned: the child sees the memory as it is at the fork, so on a CPU the snapshot costs
nothing but the pages that training changes meanwhile, and no import has to be repeated. The child
of a process with threads may hold only what forking leaves usable: it runs file writes of bytes
that are already in host memory, and neither torch's thread pools, nor collectives, nor CUDA.
`multiprocessing` would refuse to start a child from a daemon process, so this is `os.fork`.
"""

import contextlib
import gc
import os
import pickle
import select
import signal
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from moepp_megatron.runtime.stop_signals import STOP_SIGNALS, die_with_parent

_NICENESS = 5


class BackgroundError(RuntimeError):
    """The process failed or died; the message says how."""


class Background:
    """Runs `function` in a forked process, which pickles the result; OSError if none can start."""

    def __init__(self, function: Callable[[], Any]) -> None:
        reader, writer = os.pipe()
        parent = os.getpid()
        with warnings.catch_warnings():
            # Python warns that threads do not survive a fork; see above for why that is no harm.
            warnings.filterwarnings("ignore", message=".*multi-threaded.*fork")
            try:
                self._pid = os.fork()
            except OSError:
                os.close(reader)
                os.close(writer)
                raise
        if self._pid == 0:
            _live(function, writer, parent)
        os.close(writer)
        self._reader = reader
        self._received = bytearray()
        self._status: int | None = None

    def done(self) -> bool:
        """True if the process has ended; does not block."""
        while self._status is None and select.select([self._reader], [], [], 0)[0]:
            self._receive()
        return self._status is not None

    def result(self) -> Any:
        """Wait for the function and return its result; BackgroundError if it failed."""
        while self._status is None:
            self._receive()
        if self._status != 0:
            code = os.waitstatus_to_exitcode(self._status)
            how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
            raise BackgroundError(f"the writing process {how}")
        succeeded, value = pickle.loads(self._received)
        if not succeeded:
            raise BackgroundError(value)
        return value

    def kill(self) -> None:
        """End the process now and forget it."""
        if self._status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            self._close()

    def _receive(self) -> None:
        chunk = os.read(self._reader, 1 << 20)
        if chunk:
            self._received += chunk
        else:
            self._close()

    def _close(self) -> None:
        os.close(self._reader)
        try:
            _, self._status = os.waitpid(self._pid, 0)
        except ChildProcessError:
            # Somebody else waits for all children of this process; the message is enough.
            self._status = 0 if self._received else 1 << 8


def _live(function: Callable[[], Any], writer: int, parent: int) -> NoReturn:
    """The code of the child. It ends with `os._exit`, so that no code of the parent runs in it."""
    status = 1
    try:
        _detach(writer, parent)
        try:
            answer = (True, function())
        except BaseException as error:
            answer = (False, f"{type(error).__name__}: {error}")
        content = memoryview(pickle.dumps(answer))
        while content:
            content = content[os.write(writer, content) :]
        status = 0
    finally:
        os._exit(status)


def _detach(writer: int, parent: int) -> None:
    # An orphan must not continue to write next to the run that was started in its place.
    die_with_parent(parent)
    # Launchers send these to whole process groups; the parent decides whether the save continues.
    for name in STOP_SIGNALS:
        signal.signal(name, signal.SIG_IGN)
    # Sockets of the parent's process groups must close when it dies, not when this one ends.
    os.closerange(3, writer)
    os.closerange(writer + 1, os.sysconf("SC_OPEN_MAX"))
    # A collection could run finalizers of objects that belong to CUDA or to threads.
    gc.disable()
    with contextlib.suppress(OSError):
        os.nice(_NICENESS)
