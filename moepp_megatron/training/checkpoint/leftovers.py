"""What killed runs leave in a checkpoint folder: checkpoints half written or half deleted.

A folder that is being written carries its writer's host and process in its name, so that what a
dead process left is told from what a living one is writing.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
from pathlib import Path

import psutil

from moepp_megatron.training.checkpoint.names import PREFIX

logger = logging.getLogger(__name__)

# Hidden, so that no listing takes them for checkpoints.
_INCOMPLETE = "incomplete"
_DISCARDED = "discarded"


def incomplete_name(name: str) -> str:
    """A new name for the folder that `name` is written into by this process."""
    return f".{name}.{_INCOMPLETE}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


def discard(path: Path, token: str) -> None:
    """Delete a checkpoint; what a kill leaves of it on the way no longer bears its name."""
    hidden = path.with_name(f".{path.name}.{_DISCARDED}-{token}")
    path.rename(hidden)
    shutil.rmtree(hidden)


def remove_leftovers(folder: Path) -> None:
    """Delete what no living process of this machine is writing.

    Of another machine's processes nothing is known here. A run has its checkpoint folder for
    itself, so what they have left is deleted too.
    """
    for kind in (_INCOMPLETE, _DISCARDED):
        for path in sorted(folder.glob(f".{PREFIX}*.{kind}-*")):
            if not _is_being_written(path):
                logger.info("removing %s, which a save that did not finish has left", path)
                shutil.rmtree(path, ignore_errors=True)


def _is_being_written(path: Path) -> bool:
    """Whether the process that the name tells lives on this machine."""
    _, _, owner = path.name.partition(f".{_INCOMPLETE}-")
    host, _, pid = owner.rpartition("-")[0].rpartition("-")
    if host != socket.gethostname() or not pid.isdecimal() or int(pid) == os.getpid():
        return False
    try:
        # A process that began after the last file was made has been given the number of a dead one.
        return psutil.Process(int(pid)).create_time() <= path.stat().st_mtime
    except (psutil.Error, OSError, OverflowError):
        return False
