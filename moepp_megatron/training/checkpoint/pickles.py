"""Whether a checkpoint holds only data, checked before ranks begin to load it.

`data_only.py` never loads anything else; this check names the bad entry in one line, on all ranks.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import BytesStorageMetadata

from moepp_megatron.training.checkpoint.index import read_metadata
from moepp_megatron.training.checkpoint.names import TENSORS_FILE
from moepp_megatron.training.checkpoint.plain_pickle import UnsafePickleError


def unsafe_pickle(checkpoint: Path, part: int = 0, num_parts: int = 1) -> str | None:
    """Why a checkpoint is not safe to unpickle; None if it is.

    Args:
        checkpoint: The folder.
        part: Which part of the byte entries to check, so that ranks share the work.
        num_parts: Number of parts.
    """
    try:
        metadata = read_metadata(checkpoint)
        _refuse_further_indexes(checkpoint)
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
    except OSError as error:
        return f"{error.filename or checkpoint}: {error.strerror}"
    return None


def _refuse_further_indexes(checkpoint: Path) -> None:
    """Other loops would fall back to them, and no checkpoint of ours has any."""
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
