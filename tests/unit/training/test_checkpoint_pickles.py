"""Ways to have torch unpickle something else than what was looked at."""

from __future__ import annotations

import dataclasses
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
)

from moepp_megatron.training.checkpoint.pickles import read_metadata, unsafe_pickle
from tests.parallel.planted_pickles import Bomb

KEY = "common_state/shard_0_1"


def write(folder: Path, places: dict[MetadataIndex, Any]) -> None:
    """An index with one byte entry, which may have several places."""
    storage, content = {}, b""
    for index, value in places.items():
        record = io.BytesIO()
        torch.save([value], record)
        storage[index] = _StorageInfo("__0_0.distcp", len(content), len(record.getvalue()))
        content += record.getvalue()
    folder.mkdir()
    (folder / "__0_0.distcp").write_bytes(content)
    metadata = Metadata({KEY: BytesStorageMetadata()}, storage_data=storage)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def load_like_megatron(folder: Path) -> None:
    """As `dist_checkpointing.serialization.load_common_state_dict`."""
    load({KEY: io.BytesIO()}, storage_reader=FileSystemReader(folder), no_dist=True)


def test_second_place_of_a_name_is_looked_at(tmp_path: Path) -> None:
    exploded = tmp_path / "exploded"
    places = {MetadataIndex(KEY): Bomb(exploded), MetadataIndex(KEY, torch.Size([0])): "harmless"}
    write(tmp_path / "checkpoint", places)
    reason = unsafe_pickle(tmp_path / "checkpoint")
    assert reason is not None
    assert "entry common_state/shard_0_1 asks for" in reason
    assert not exploded.exists()
    # Otherwise this would happen: torch takes the other place.
    load_like_megatron(tmp_path / "checkpoint")
    assert exploded.exists()


def test_index_of_a_rank_is_refused(tmp_path: Path) -> None:
    folder, exploded = tmp_path / "checkpoint", tmp_path / "exploded"
    write(folder, {MetadataIndex(KEY): "harmless"})
    assert unsafe_pickle(folder) is None
    metadata = read_metadata(folder)
    # Data, but nothing that torch can use.
    broken = dataclasses.replace(metadata, storage_meta=torch.Size([1]))
    (folder / ".metadata").write_bytes(pickle.dumps(broken))
    (folder / "__0.metadata").write_bytes(pickle.dumps(Bomb(exploded)))
    assert unsafe_pickle(folder) == "__0.metadata does not belong into this format"
    assert not exploded.exists()
    # Otherwise this would happen: torch falls back to the rank's own index.
    with pytest.raises(CheckpointException, match="rank local metadata read failed"):
        load_like_megatron(folder)
    assert exploded.exists()


def test_index_written_by_either_python_is_read(tmp_path: Path) -> None:
    """torch stores the folder's path as an object, whose module Python 3.13 has renamed."""
    write(tmp_path / "checkpoint", {MetadataIndex(KEY): "harmless"})
    metadata = read_metadata(tmp_path / "checkpoint")
    metadata.storage_meta = StorageMeta(checkpoint_id=tmp_path)
    (tmp_path / "checkpoint" / ".metadata").write_bytes(pickle.dumps(metadata))
    found = read_metadata(tmp_path / "checkpoint").storage_meta
    assert found is not None
    assert found.checkpoint_id == tmp_path
