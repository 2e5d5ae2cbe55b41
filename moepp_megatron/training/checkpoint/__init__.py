"""Checkpoints of a run: contents, writing and reading.

files.py         names, progress and record, damage: all that reads bytes only
plain_pickle.py  reads the description in a pickle without unpickling it
index.py         the index of the tensors, rebuilt from plain values
data_only.py     makes megatron-core and torch read one as data, never code
find.py          finds the checkpoint that a name means, and the newest valid one
compatible.py    compares a configuration with the one that a checkpoint was written with
optimizer.py     state of optimizers: their steps, a rank's shard in terms of whole parameters
state.py         model, optimizer, schedule as megatron-core's sharded state
background.py    a forked process that writes, a thread that uploads, while training continues
save.py          one save: planned, written by all ranks, published
retention.py     deletes old checkpoints, and what killed runs left; checks the space of future ones
write.py         `CheckpointWriter`: the saves of a run, on which all ranks agree
read.py          all of a load

Names are imported on first use: finding a checkpoint and refusing one that does not fit needs no
torch, so the command line answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moepp_megatron.training.checkpoint.compatible import check_compatible
from moepp_megatron.training.checkpoint.files import Progress, damage, is_checkpoint
from moepp_megatron.training.checkpoint.find import (
    NoStartError,
    check_start,
    find_checkpoint,
    list_checkpoints,
    newest_again,
)

if TYPE_CHECKING:
    from moepp_megatron.training.checkpoint.read import (
        Loaded,
        find_start,
        load_weights,
        newest_valid,
        read_checkpoint,
    )
    from moepp_megatron.training.checkpoint.write import CheckpointWriter

__all__ = [
    "CheckpointWriter",
    "Loaded",
    "NoStartError",
    "Progress",
    "check_compatible",
    "check_start",
    "damage",
    "find_checkpoint",
    "find_start",
    "is_checkpoint",
    "list_checkpoints",
    "load_weights",
    "newest_again",
    "newest_valid",
    "read_checkpoint",
]

_READ = {"Loaded", "find_start", "load_weights", "newest_valid", "read_checkpoint"}


def __getattr__(name: str) -> Any:
    if name not in {"CheckpointWriter", *_READ}:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "read" if name in _READ else "write"
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
