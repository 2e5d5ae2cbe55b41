"""Checkpoints in object storage: each rank writes its files here first, then uploads them.

A file is deleted here once it is uploaded, so that the staging folder needs room for the ranks of
one machine and one checkpoint, and no folder has to be shared between machines.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from moepp_megatron.runtime.object_store import ObjectPath
from moepp_megatron.runtime.store_errors import StoreError
from moepp_megatron.training.checkpoint.background import Background
from moepp_megatron.training.checkpoint.plan import Written


def upload(written: Written, folder: Path, final: ObjectPath) -> Written:
    """Upload the files that this rank has written into `folder`, and delete them there.

    Raises:
        StoreError: The store does not take them.
    """
    for name in written.digests:
        (final / name).upload(folder / name)
        (folder / name).unlink()
    return written


def check_uploaded(final: ObjectPath, sizes: dict[str, int]) -> None:
    """Compare what the store has with what was written; the checksums were its own to compare.

    Raises:
        StoreError: An object is missing, or has another size.
    """
    there = {path.name: path.stat().st_size for path in final.iterdir()}
    for name, size in sizes.items():
        if there.get(name) != size:
            found = f"{there[name]} bytes" if name in there else "nothing"
            raise StoreError(f"{final / name} was uploaded with {size} bytes, and {found} is there")


class BackgroundUpload:
    """Uploads what a process writes, in a thread of this one; used as the process is.

    A thread, because a client of a network is none of what forking leaves usable (background.py).
    It waits for the network nearly all of its time.
    """

    def __init__(self, process: Background, send: Callable[[Written], Written]) -> None:
        self._process = process
        self._send = send
        self._written: Written | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint upload", daemon=True)
        self._thread.start()

    def done(self) -> bool:
        """Whether it has ended; returns at once."""
        return not self._thread.is_alive()

    def result(self) -> Written:
        """What was written and uploaded; waits for it.

        Raises:
            BackgroundError: The process has failed.
            StoreError: The upload has failed.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._written is not None, "an upload without a result"
        return self._written

    def kill(self) -> None:
        """End the process; what is uploaded without it is no checkpoint."""
        self._process.kill()

    def _run(self) -> None:
        try:
            self._written = self._send(self._process.result())
        except Exception as error:  # told to the rank, which asks for the result
            self._error = error
