"""Makes megatron-core and torch read a checkpoint as data only, never as code.

torch.distributed.checkpoint unpickles `.metadata` and byte entries without restrictions
(filesystem.py, default_planner.py). While `load_data` runs, they get an index that
`plain_pickle.py` rebuilt in place of the file, and `torch.load` reads nothing but data, whatever
its caller asks for. Before ranks begin, `unsafe_pickle` names an entry that is no data in one line,
on all ranks alike.
"""

import io
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import torch as strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
)
from torch.distributed.checkpoint import BytesStorageMetadata, FileSystemReader
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from moepp_megatron.config.regular_file import check_regular
from moepp_megatron.file_names import FORMAT_FILE, TENSORS_FILE
from moepp_megatron.runtime.object_store import ObjectPath
from moepp_megatron.runtime.patches import replaced
from moepp_megatron.runtime.rank import environment
from moepp_megatron.training.checkpoint.plain_pickle import UnsafePickleError, read_metadata

# torch/serialization.py: the first beats an explicit `weights_only=False`, and does not go together
# with the second.
_ONLY_DATA, _ALSO_CODE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def load_data(state: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """Load as `megatron.core.dist_checkpointing.load` does, but only data; every rank must call.

    UnsafePickleError if its index holds anything else, OSError if it cannot be read.
    """
    metadata = read_metadata(checkpoint)
    reader: Any = partial(_CheckpointReader, metadata)
    if isinstance(checkpoint, ObjectPath):
        reader = partial(_ObjectReader, metadata, checkpoint)
    # megatron-core has no argument for the reader of the common state.
    with (
        only_data(),
        _local_folder(checkpoint) as folder,
        replaced(strategy, FileSystemReader=reader),
    ):
        made = strategy._get_filesystem_reader(folder)
        assert isinstance(made, _CheckpointReader), f"megatron-core reads with {type(made)}"
        loaded: dict[str, Any] = dist_checkpointing.load(
            state, str(folder), _each_byte_once(strategy.TorchDistLoadShardedStrategy())
        )
    return loaded


@contextmanager
def _local_folder(checkpoint: Path) -> Iterator[Path]:
    """Make a local folder with the files that megatron-core opens itself: the format's."""
    if not isinstance(checkpoint, ObjectPath):
        yield checkpoint
        return
    with tempfile.TemporaryDirectory(prefix="moepp-") as folder:
        (Path(folder) / FORMAT_FILE).write_bytes((checkpoint / FORMAT_FILE).read_bytes())
        yield Path(folder)


def _each_byte_once(reading: Any) -> Any:
    """Load strategy by which data-parallel ranks share the reading of what they all need."""
    if not parallel_state.is_initialized():
        return reading
    return FullyParallelLoadStrategyWrapper(
        reading, parallel_state.get_data_parallel_group(with_context_parallel=True)
    )


def only_data() -> AbstractContextManager[None]:
    """Force `torch.load` to use `weights_only=True` in the block."""
    return environment(**{_ONLY_DATA: "1", _ALSO_CODE: None})


def refuse_packed(record: IO[bytes]) -> None:
    """Refuse (UnsafePickleError) a compressed record of `torch.save`, which torch never writes."""
    try:
        with zipfile.ZipFile(record) as archive:
            is_packed = any(each.file_size > each.compress_size for each in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        is_packed = False  # torch says what is wrong with it, or knows the format before
    record.seek(0)
    if is_packed:
        raise UnsafePickleError("is compressed, as no checkpoint's is")


def _in_memory(file: Any, info: Any) -> IO[bytes]:
    """Read the record at a place of a file; refused if it is packed."""
    file.seek(info.offset)
    record = io.BytesIO(file.read(info.length))
    refuse_packed(record)
    return record


class _CheckpointReader(FileSystemReader):
    """Reads the files of a checkpoint by an index that it is given."""

    def __init__(self, metadata: Metadata, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._metadata = metadata

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        record = super()._slice_file(file, sinfo)
        refuse_packed(record)
        return record

    # Without arguments: torch would otherwise look for an index of the rank's own as well.
    def read_metadata(self) -> Metadata:
        """The index that was given; the file is not opened."""
        return self._metadata


class _ObjectReader(_CheckpointReader):
    """Reads ranges of a checkpoint's objects: what this rank needs, and nothing else."""

    def __init__(
        self, metadata: Metadata, checkpoint: ObjectPath, path: str | os.PathLike[str]
    ) -> None:
        super().__init__(metadata, path)
        self.fs = _Objects(checkpoint)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Same as torch's, in the order of the bytes, so that one request serves neighbours."""

        def order(item: ReadItem) -> tuple[str, int]:
            info = self.storage_data[item.storage_index]
            return info.relative_path, info.offset

        return super().read_data(replace(plan, items=sorted(plan.items, key=order)), planner)

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        # torch.load would jump about in it.
        return _in_memory(file, sinfo)


class _Objects(FileSystem):
    """Opens objects of a checkpoint by the names that its files would have in a folder."""

    def __init__(self, checkpoint: ObjectPath) -> None:
        self._checkpoint = checkpoint

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """A reader of an object."""
        with (self._checkpoint / Path(path).name).open(mode) as file:
            yield file


def unsafe_pickle(checkpoint: Path, part: int = 0, num_parts: int = 1) -> str | None:
    """Describe what is unsafe in the index or in part `part` of the entries; None if nothing is."""
    try:
        metadata = read_metadata(checkpoint)
        _refuse_further_indexes(checkpoint)
        reader = _CheckpointReader(metadata, checkpoint)
        # All places of a name: torch looks them up by name and offset, and any of them may be it.
        entries = [(index.fqn, info) for index, info in metadata.storage_data.items()]
        entries.sort(key=lambda entry: (entry[0], entry[1].relative_path, entry[1].offset))
        for key, info in entries[part::num_parts]:
            if isinstance(metadata.state_dict_metadata.get(key), BytesStorageMetadata):
                _check_entry(checkpoint, key, info)
            elif not isinstance(checkpoint, ObjectPath):
                # Of objects when they are read, which asks for them once.
                with _opened(checkpoint, key, info) as file:
                    reader._slice_file(file, info)
    except UnsafePickleError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename or checkpoint}: {error.strerror}"
    return None


def _refuse_further_indexes(checkpoint: Path) -> None:
    """Refuse further indexes: other loops fall back to them, ours have none."""
    for path in sorted(checkpoint.glob(f"*{TENSORS_FILE}")):
        if path.name != TENSORS_FILE:
            raise UnsafePickleError(f"{path.name} does not belong into this format")


@contextmanager
def _opened(checkpoint: Path, key: str, info: Any) -> Iterator[Any]:
    """The file of an entry, which is in it whole; what is wrong with the entry names it."""
    path = checkpoint / info.relative_path
    check_regular(path)
    try:
        if info.offset + info.length > path.stat().st_size:
            raise UnsafePickleError("is cut short")
        with path.open("rb", buffering=0) as file:
            yield file
    except UnsafePickleError as error:
        raise UnsafePickleError(f"{info.relative_path}: entry {key} {error}") from error


def _check_entry(checkpoint: Path, key: str, info: Any) -> None:
    with _opened(checkpoint, key, info) as file:
        record = _in_memory(file, info)
    try:
        torch.load(record, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds; each of them refuses the entry
        # Torch's message explains at length how to read the entry all the same.
        asked = re.search(r"GLOBAL (\S+)", str(error))
        what = (
            f"asks for {asked[1]}, which no checkpoint contains"
            if asked
            else f"cannot be read ({type(error).__name__})"
        )
        raise UnsafePickleError(f"{info.relative_path}: entry {key} {what}") from error
