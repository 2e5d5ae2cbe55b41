"""Removes what killed runs leave in a checkpoint folder: half written or deleted checkpoints.

A folder that is being written has its writer's host and process in its name, which distinguishes
the remains of a dead process from a save in progress.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
from pathlib import Path

from moepp_megatron.training.checkpoint.names import PREFIX

logger = logging.getLogger(__name__)

# Hidden, so that no listing takes them for checkpoints.
_INCOMPLETE = "incomplete"
_DISCARDED = "discarded"


def incomplete_name(name: str) -> str:
    """A new name for the folder that `name` is written into by this process."""
    return f".{name}.{_INCOMPLETE}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


def discard(path: Path, token: str) -> None:
    """Delete a checkpoint. It is renamed first, so that a kill leaves no damaged one."""
    hidden = path.with_name(f".{path.name}.{_DISCARDED}-{token}")
    path.rename(hidden)
    shutil.rmtree(hidden)


def remove_leftovers(folder: Path) -> None:
    """Delete what no living process of this machine is writing.

    Processes of other machines cannot be checked here. A run has its checkpoint folder for
    itself, so their remains are deleted too.
    """
    for kind in (_INCOMPLETE, _DISCARDED):
        for path in sorted(folder.glob(f".{PREFIX}*.{kind}-*")):
            if not _is_being_written(path):
                logger.info("removing %s, which a save that did not finish has left", path)
                shutil.rmtree(path, ignore_errors=True)


def _is_being_written(path: Path) -> bool:
    """Whether the process in the folder's name is alive on this machine."""
    import psutil

    _, _, owner = path.name.partition(f".{_INCOMPLETE}-")
    host, _, pid = owner.rpartition("-")[0].rpartition("-")
    if host != socket.gethostname() or not pid.isdecimal() or int(pid) == os.getpid():
        return False
    try:
        # A process that began after the last file was made has been given the number of a dead one.
        return psutil.Process(int(pid)).create_time() <= path.stat().st_mtime
    except (psutil.Error, OSError, OverflowError):
        return False
