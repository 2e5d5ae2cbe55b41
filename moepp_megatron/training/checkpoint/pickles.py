"""Whether a checkpoint can be unpickled without running code that somebody planted in it.

torch.distributed.checkpoint unpickles `.metadata` with plain `pickle`, and byte entries with
`torch.load(weights_only=False)` (filesystem.py, default_planner.py). Checksums do not help: who can
write the file can write the manifest. So both are read here first with unpicklers that know only
the classes of a checkpoint; what they accept, the plain ones then read without harm. Tensors are
read with `weights_only=True` by torch itself.
"""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import BytesStorageMetadata
from torch.distributed.checkpoint.metadata import Metadata

from moepp_megatron.training.checkpoint.names import TENSORS_FILE

# From this module any class does: all of them are plain records.
_RECORDS = "torch.distributed.checkpoint.metadata"
_PLANNER = "torch.distributed.checkpoint.planner"
_CLASSES = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    # Plans of all ranks, which torch's own writer keeps.
    (_PLANNER, "SavePlan"),
    (_PLANNER, "WriteItem"),
    (_PLANNER, "WriteItemType"),
    (_PLANNER, "TensorWriteData"),
    (_PLANNER, "BytesIOWriteData"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "Path"),
    # Where Python 3.13 has them.
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "Path"),
}


class UnsafePickleError(ValueError):
    """A file of a checkpoint holds something that is not data."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module == _RECORDS and "." not in name:
            found = super().find_class(module, name)
            # Defined there, not what the module imports.
            if isinstance(found, type) and found.__module__ == module:
                return found
        raise UnsafePickleError(
            f"{TENSORS_FILE} asks for {module}.{name}, which no checkpoint contains"
        )


def read_metadata(checkpoint: Path) -> Metadata:
    """The index of a checkpoint's tensors.

    Raises:
        UnsafePickleError: The file is not an index alone.
        OSError: It cannot be read.
    """
    with (checkpoint / TENSORS_FILE).open("rb") as file:
        try:
            metadata = _MetadataUnpickler(file).load()
        except UnsafePickleError:
            raise
        except Exception as error:  # whatever damaged bytes make an unpickler do
            raise UnsafePickleError(f"{TENSORS_FILE} cannot be read ({error})") from error
    if not isinstance(metadata, Metadata):
        raise UnsafePickleError(f"{TENSORS_FILE} holds a {type(metadata).__name__}, not an index")
    return metadata


def unsafe_pickle(checkpoint: Path, part: int = 0, num_parts: int = 1) -> str | None:
    """What in a checkpoint would not be safe to unpickle; None if nothing.

    Args:
        checkpoint: The folder.
        part: Which part of the byte entries to check, so that ranks share the work.
        num_parts: Number of parts.
    """
    try:
        metadata = read_metadata(checkpoint)
        _check_index(checkpoint, metadata)
        # All places of a name: torch looks them up by name and offset, and any of them may be it.
        entries = [
            (index.fqn, info)
            for index, info in metadata.storage_data.items()
            if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata)
        ]
        entries.sort(key=lambda entry: (entry[0], entry[1].relative_path, entry[1].offset))
        for key, info in entries[part::num_parts]:
            _check_entry(checkpoint, key, info)
    except UnsafePickleError as error:
        return str(error)
    except (KeyError, AttributeError, TypeError) as error:
        return f"{TENSORS_FILE} is damaged ({error!r})"
    except OSError as error:
        return f"{error.filename or checkpoint}: {error.strerror}"
    return None


def _check_index(checkpoint: Path, metadata: Metadata) -> None:
    for index, info in metadata.storage_data.items():
        if Path(info.relative_path).name != info.relative_path:
            raise UnsafePickleError(
                f"{TENSORS_FILE} places {index.fqn} outside of the folder: {info.relative_path}"
            )
        if info.transform_descriptors:
            raise UnsafePickleError(f"{TENSORS_FILE} wants {index.fqn} decoded by an extension")
    # Where torch cannot use the index it unpickles a rank's own one instead
    # (state_dict_loader.py, `local_step`). No checkpoint of ours has such a file.
    for path in sorted(checkpoint.glob(f"*{TENSORS_FILE}")):
        if path.name != TENSORS_FILE:
            raise UnsafePickleError(f"{path.name} does not belong into this format")


def _check_entry(checkpoint: Path, key: str, info: Any) -> None:
    with (checkpoint / info.relative_path).open("rb") as file:
        file.seek(info.offset)
        content = file.read(info.length)
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds; each of them refuses the entry
        # Torch's message explains at length how to read the entry all the same.
        asked = re.search(r"GLOBAL (\S+)", str(error))
        what = (
            f"asks for {asked[1]}, which no checkpoint contains"
            if asked
            else f"cannot be read ({type(error).__name__})"
        )
        raise UnsafePickleError(f"{info.relative_path}: entry {key} {what}") from error
