"""Finds checkpoints of Megatron-LM's own training loop and reads their arguments.

    SAVE/latest_checkpointed_iteration.txt    the number of the newest, or `release`
    SAVE/iter_0000100/                        megatron-core's distributed format
    SAVE/release/                             weights alone

The arguments are a pickled `argparse.Namespace` among other objects. They are read without
importing, calling or building anything that the file names: every class that it asks for becomes an
empty stand-in of this module.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from moepp_megatron.config import ConfigError
from moepp_megatron.file_names import FORMAT_FILE
from moepp_megatron.interop.checkpoint_reader import TensorReader

TRACKER_FILE = "latest_checkpointed_iteration.txt"
RELEASE = "release"
# Where megatron-core keeps what is not sharded: in the checkpoint, or before 0.17 in a file.
_COMMON_KEY = "common_state"
_COMMON_FILE = "common.pt"
# Megatron's is some tens of kilobytes.
_MOST_BYTES = 64 * 1024**2


def find_megatron_checkpoint(source: Path) -> Path:
    """The checkpoint that a `--save` folder of Megatron-LM, or one of its checkpoints, means.

    ConfigError if there is none, or it is of another format than torch_dist.
    """
    folder = source
    tracker = source / TRACKER_FILE
    if tracker.is_file():
        newest = tracker.read_text(encoding="utf-8", errors="replace").strip()
        folder = source / (f"iter_{int(newest):07d}" if newest.isdecimal() else RELEASE)
    if not (folder / FORMAT_FILE).is_file():
        raise ConfigError(
            f"SRC ({folder}) must be a checkpoint of Megatron-LM in the format torch_dist, and has "
            f"no {FORMAT_FILE}; name a --save folder or one of its iter_* folders, written with "
            "--ckpt-format torch_dist"
        )
    return folder


def read_arguments(reader: TensorReader) -> Namespace:
    """The arguments of the run that wrote a checkpoint: numbers, texts and lists of these.

    Other values, such as enumerations, are left out. ConfigError if they cannot be read.
    """
    legacy = reader.folder / _COMMON_FILE
    try:
        record = legacy.read_bytes() if legacy.is_file() else reader.read_bytes(_COMMON_KEY)
        common = _unpickled(record)
        # A sharded object is a list with one entry.
        common = common[0] if isinstance(common, list) else common
        values = common["args"].state
        return Namespace(**{name: value for name, value in values.items() if _is_plain(value)})
    except Exception as error:  # whatever damaged or crafted bytes make an unpickler do
        raise ConfigError(
            f"{reader.folder} must hold the arguments of the run that wrote it, as Megatron-LM's "
            f"checkpoints do, and they cannot be read ({type(error).__name__}); name another one"
        ) from None


class _StandIn:
    """The class that replaces every class of the file: it keeps the state that it is given."""

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        """Accept the items of a class that is a list."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # A class of its own, so that nothing in the file reaches one that others use.
        return type("StandIn", (_StandIn,), {})

    def persistent_load(self, pid: Any) -> Any:
        return _StandIn()  # the data of a tensor


def _unpickled(record: bytes) -> Any:
    """The object in a file of `torch.save`."""
    with zipfile.ZipFile(io.BytesIO(record)) as archive:
        (entry,) = (info for info in archive.infolist() if info.filename.endswith("/data.pkl"))
        if entry.file_size > _MOST_BYTES:
            raise ValueError("too large")
        return _Unpickler(io.BytesIO(archive.read(entry))).load()


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(part) for part in value)
    return value is None or type(value) in (bool, int, float, str)
