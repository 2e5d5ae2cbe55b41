"""Space on the disk of a checkpoint folder."""

from __future__ import annotations

from pathlib import Path

from moepp_megatron.config import Config, checkpoint_bytes
from moepp_megatron.runtime.disk import free_bytes, show_bytes
from moepp_megatron.runtime.object_store import ObjectPath
from moepp_megatron.training.checkpoint.find import list_checkpoints


def lack_of_space(config: Config, folder: Path, step: int) -> str | None:
    """A warning with numbers where the checkpoints to come do not fit; None where they do.

    A new checkpoint is complete before an old one is deleted, so `checkpoint.keep` needs the space
    of one more. Those that exist already have theirs.
    """
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


def space_text(needed: int, folder: Path) -> str:
    """The needed and the free bytes, in brackets, for a message about a full disk."""
    try:
        free = show_bytes(free_bytes(folder))
    except OSError:
        return ""
    return f" ({show_bytes(needed)} needed, {free} free in {folder})"
