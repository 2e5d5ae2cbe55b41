"""Space of a checkpoint folder: deletes old checkpoints and the remains of killed runs.

`Pruner` deletes only on rank 0, after a newer checkpoint is complete. A folder that is being
written carries its writer's host and process in its name, which distinguishes the remains of a dead
process from a save in progress.
"""

import logging
import os
import secrets
import shutil
import socket
from pathlib import Path

import psutil

from moepp_megatron.config import Config, checkpoint_bytes
from moepp_megatron.file_names import MANIFEST_FILE
from moepp_megatron.runtime.disk import free_bytes, show_bytes
from moepp_megatron.runtime.object_store import ObjectPath, StoreError
from moepp_megatron.training.checkpoint.files import PREFIX, damage, plain_damage
from moepp_megatron.training.checkpoint.find import list_checkpoints


def lack_of_space(config: Config, folder: Path, step: int) -> str | None:
    """Return a warning with numbers if the checkpoints to come do not fit, None if they do."""
    # A new checkpoint is complete before an old one is deleted, so `checkpoint.keep` needs the
    # space of one more. Those that exist already have theirs.
    keep, interval = config.checkpoint.keep, config.checkpoint.save_interval
    last = config.training.train_iters
    if interval == 0 or step >= last or isinstance(folder, ObjectPath):
        return None
    count = -(-last // interval) - step // interval
    if keep is not None:
        count = min(count, keep + 1 - min(keep, len(list_checkpoints(folder))))
    needed = count * checkpoint_bytes(config)
    try:
        free = free_bytes(folder)
    except OSError:
        return None
    if needed <= free:
        return None
    return (
        f"checkpoint.keep ({'null' if keep is None else keep}) needs room for {count} more "
        f"checkpoints of {show_bytes(checkpoint_bytes(config))}, {show_bytes(needed)} in all, and "
        f"{show_bytes(free)} are free in {folder}; free space, lower checkpoint.keep, or set "
        "another checkpoint.dir"
    )


logger = logging.getLogger(__name__)

# Hidden, so that no listing takes them for checkpoints.
_INCOMPLETE = "incomplete"
_DISCARDED = "discarded"
_LEFT = "removing %s, which a save that did not finish has left"


class Pruner:
    """Keeps the `keep` newest valid checkpoints (all for None), and removes half-written ones.

    One that cannot be read is neither counted nor deleted: it may be all that is left of something.
    """

    def __init__(self, folder: Path, keep: int | None) -> None:
        self._folder = folder
        self._keep = keep
        # Hashing a checkpoint takes time, so each is looked at once. Those that this run writes
        # were hashed as they were written.
        self._is_valid: dict[str, bool] = {}

    def unknown(self, written: Path) -> list[Path]:
        """Return checkpoints to hash by all ranks before `wrote(written)`; none of a store."""
        # All of a store's would be read from there, while training waits.
        if self._keep is None or isinstance(self._folder, ObjectPath):
            return []
        known = {*self._is_valid, written.name}
        return [path for path in list_checkpoints(self._folder) if path.name not in known]

    def note(self, checkpoint: Path, reason: str | None) -> None:
        """Note why a checkpoint is invalid; None if it is valid."""
        self._is_valid[checkpoint.name] = reason is None
        if reason is not None:
            logger.warning("checkpoint.keep does not delete %s: %s", checkpoint, reason)

    def wrote(self, checkpoint: Path) -> None:
        """Note a checkpoint that this run has just completed, and delete what is now too old."""
        self._is_valid[checkpoint.name] = True
        try:
            self._prune(checkpoint)
            remove_leftovers(self._folder)
        except (OSError, StoreError) as error:
            logger.error("old checkpoints could not be deleted: %s", error)

    def _prune(self, written: Path) -> None:
        if self._keep is None:
            return
        # Never delete what was just written, whatever the dates of the others.
        others = [path for path in list_checkpoints(self._folder) if path.name != written.name]
        valid = [path for path in others if self._valid(path)]
        for checkpoint in valid[self._keep - 1 :]:
            discard(checkpoint, secrets.token_hex(4))

    def _valid(self, checkpoint: Path) -> bool:
        if checkpoint.name not in self._is_valid:
            is_far = isinstance(checkpoint, ObjectPath)
            self.note(checkpoint, plain_damage(checkpoint) if is_far else damage(checkpoint))
        return self._is_valid[checkpoint.name]


def incomplete_name(name: str) -> str:
    """Make a new name for the folder in which this process writes `name`."""
    return f".{name}.{_INCOMPLETE}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


def discard(path: Path, token: str) -> None:
    """Delete a checkpoint; a kill midway leaves none that looks complete."""
    if isinstance(path, ObjectPath):
        path.delete_below(MANIFEST_FILE)
        return
    hidden = path.with_name(f".{path.name}.{_DISCARDED}-{token}")
    path.rename(hidden)
    shutil.rmtree(hidden)


def remove_leftovers(folder: Path) -> None:
    """Delete partial checkpoints, but for those that live processes of this machine write."""
    # Of another machine's processes nothing is known here. A run has its checkpoint folder for
    # itself, so what they have left is deleted too. In object storage that is what has no manifest.
    if isinstance(folder, ObjectPath):
        for path in list_checkpoints(folder):
            if isinstance(path, ObjectPath) and not (path / MANIFEST_FILE).is_file():
                logger.info(_LEFT, path)
                path.delete_below()
        return
    for kind in (_INCOMPLETE, _DISCARDED):
        for path in sorted(folder.glob(f".{PREFIX}*.{kind}-*")):
            if not _is_being_written(path):
                logger.info(_LEFT, path)
                shutil.rmtree(path, ignore_errors=True)


def _is_being_written(path: Path) -> bool:
    """True if the process in the name lives on this machine."""
    _, _, owner = path.name.partition(f".{_INCOMPLETE}-")
    host, _, pid = owner.rpartition("-")[0].rpartition("-")
    if host != socket.gethostname() or not pid.isdecimal() or int(pid) == os.getpid():
        return False
    try:
        # A process that began after the last file was made has been given the number of a dead one.
        return psutil.Process(int(pid)).create_time() <= path.stat().st_mtime
    except (psutil.Error, OSError, OverflowError):
        return False
