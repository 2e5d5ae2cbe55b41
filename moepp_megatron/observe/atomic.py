"""Writes whole files so that a reader never sees a partial one."""

import contextlib
import os
import tempfile
from pathlib import Path


def write_atomic(path: Path, content: bytes) -> None:
    """Replaces ``path`` by ``content`` in one step (temporary file in the same folder, rename).

    Args:
        path: The file; its folder must exist.
        content: All of its bytes.

    Raises:
        OSError: If the folder is missing, full or not writable; ``path`` is then unchanged.
    """
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes the file private; a run's files follow the user's umask instead.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
