"""Makes megatron-core and torch read a checkpoint as data only, never as code.

torch.distributed.checkpoint unpickles `.metadata` and byte entries without restrictions
(filesystem.py, default_planner.py). While `load_data` runs, they get an index that `index.py`
rebuilt in place of the file, and `torch.load` reads nothing but data, whatever its caller asks for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import torch as strategy
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from moepp_megatron.training.checkpoint.index import read_metadata

# torch/serialization.py: the first beats an explicit `weights_only=False`, and does not go together
# with the second.
_ONLY_DATA, _ALSO_CODE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def load_data(state: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """Same as `megatron.core.dist_checkpointing.load`, which every rank must call.

    Args:
        state: The sharded state to read.
        checkpoint: The folder.

    Raises:
        UnsafePickleError: If its index holds anything else.
        OSError: It cannot be read.
    """
    reader = partial(_Reader, read_metadata(checkpoint))
    # megatron-core has no argument for the reader of the common state.
    with only_data(), patch.object(strategy, "FileSystemReader", reader):
        made = strategy._get_filesystem_reader(checkpoint)
        assert isinstance(made, _Reader), f"megatron-core reads with a {type(made).__name__}"
        loaded: dict[str, Any] = dist_checkpointing.load(state, str(checkpoint))
    return loaded


@contextmanager
def only_data() -> Iterator[None]:
    """A context in which `torch.load` uses `weights_only=True`, whatever its caller asks for."""
    before = {name: os.environ.pop(name, None) for name in (_ONLY_DATA, _ALSO_CODE)}
    os.environ[_ONLY_DATA] = "1"
    try:
        yield
    finally:
        del os.environ[_ONLY_DATA]
        os.environ.update({name: value for name, value in before.items() if value is not None})


class _Reader(FileSystemReader):
    """Reads the files of a checkpoint by an index that it is given."""

    def __init__(self, metadata: Metadata, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._metadata = metadata

    # Without arguments: torch would otherwise look for an index of the rank's own as well.
    def read_metadata(self) -> Metadata:
        """The index that was given; the file is not opened."""
        return self._metadata
