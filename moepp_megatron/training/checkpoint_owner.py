"""Whose a checkpoint folder is. Two runs in one would delete and continue each other's checkpoints.

A run that is let in marks a checkpoint folder outside of its own with the file `owner`, which names
the run's folder. A mark counts while that folder has a `status.json`: a run that was renamed or
deleted owns nothing under its old name. Object storage has no marks.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from moepp_megatron.config import Config, ConfigError, load_config
from moepp_megatron.file_names import CONFIG_FILE, OWNER_FILE, STATUS_FILE
from moepp_megatron.observe.status import read_status
from moepp_megatron.runtime.atomic import create_atomic, write_atomic
from moepp_megatron.runtime.object_store import ObjectPath
from moepp_megatron.training.checkpoint import list_checkpoints
from moepp_megatron.training.run_folder import (
    checkpoint_folder,
    is_inside,
    is_same,
    outside_checkpoint_folder,
)


def refuse_other_owner(config: Config) -> None:
    """Refuse a checkpoint folder that is another run's.

    Raises:
        ConfigError: If it is; names that run's folder.
    """
    owner = _other_owner(config)
    if owner is not None:
        raise ConfigError(
            f"checkpoint.dir ({checkpoint_folder(config)}) must not hold checkpoints of another "
            f"run, and has those of {owner}; choose another checkpoint.dir"
        )


def _other_owner(config: Config) -> Path | None:
    """The folder of another run whose checkpoints are where this one's would go, if it is there."""
    folder, checkpoints = Path(config.run.dir), checkpoint_folder(config)
    if is_inside(checkpoints, folder):
        return None
    marked = marked_owner(checkpoints)
    if marked is not None:
        return None if is_same(marked, folder) else marked
    # Of a run that has not saved yet, too.
    is_own_name = checkpoints.name == "checkpoints" and not isinstance(checkpoints, ObjectPath)
    if is_own_name and read_status(Path(os.path.realpath(checkpoints)).parent) is not None:
        return checkpoints.parent
    for checkpoint in list_checkpoints(checkpoints):
        try:
            owner = Path(load_config(checkpoint / CONFIG_FILE).run.dir)
        except ConfigError:
            continue
        # A run that was renamed has no folder of its old name.
        is_there = (owner / CONFIG_FILE).is_file()
        return owner if is_there and not is_same(owner, folder) else None
    return None


def marked_owner(checkpoints: Path) -> Path | None:
    """The run's folder that a mark in a checkpoint folder names; None without one that counts."""
    if isinstance(checkpoints, ObjectPath):
        return None
    try:
        owner = Path(os.fsdecode((checkpoints / OWNER_FILE).read_bytes()).removesuffix("\n"))
    except OSError:
        return None
    return owner if owner.is_absolute() and (owner / STATUS_FILE).is_file() else None


def is_marked(config: Config) -> bool:
    """Whether the run has marked its checkpoint folder."""
    outside = outside_checkpoint_folder(config)
    marked = None if outside is None else marked_owner(outside)
    return marked is not None and is_same(marked, Path(config.run.dir))


def mark_checkpoints(config: Config) -> None:
    """Mark a checkpoint folder outside of the run's, which must have its `status.json` by now.

    Raises:
        FileExistsError: Another run has marked it.
        OSError: The folder cannot be written.
    """
    outside = outside_checkpoint_folder(config)
    if outside is None or is_marked(config):
        return
    mark = outside / OWNER_FILE
    if mark.exists() and marked_owner(outside) is None:
        mark.unlink()
    create_atomic(mark, _content(Path(config.run.dir)))


def remove_mark(config: Config) -> None:
    """Remove the run's own mark."""
    outside = outside_checkpoint_folder(config)
    if outside is not None and is_marked(config):
        with contextlib.suppress(OSError):
            (outside / OWNER_FILE).unlink()


def carry_mark(checkpoints: Path, place: Path | None, run: Path) -> None:
    """Take a run's mark along with what is moved aside.

    Args:
        checkpoints: Its checkpoint folder of before.
        place: Where its checkpoints are now; None if it had none.
        run: Where its other files are now.
    """
    (checkpoints / OWNER_FILE).unlink(missing_ok=True)
    if place is not None:
        write_atomic(place / OWNER_FILE, _content(run))


def _content(run: Path) -> bytes:
    return os.fsencode(os.path.realpath(run)) + b"\n"
