"""Writes a checkpoint in megatron-core's distributed format, one tensor at a time.

megatron-core writes from a model that is in memory. Here every tensor is produced when its turn
comes, so a model of any size passes through the memory of one tensor. The files are those of
`torch.distributed.checkpoint` (a pickled index `.metadata` and data files of `torch.save` records),
which is what megatron-core's `torch_dist` format is.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from moepp_megatron.file_names import FORMAT_FILE, MANIFEST_FILE, TENSORS_FILE
from moepp_megatron.interop.checkpoint_reader import TensorReader
from moepp_megatron.training.checkpoint.files import file_digest

# Data of about this size goes into one file, so that many readers can work side by side.
_FILE_BYTES = 2 * 1024**3


class ConvertedCheckpointWriter:
    """Writes tensors, or slices of them along the first axis, in any order.

    `folder` is empty, or has data files that tensors are adopted from; the names of new data files
    begin with `prefix`.
    """

    def __init__(self, folder: Path, prefix: str = "__0") -> None:
        self._folder = folder
        self._prefix = prefix
        self._tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._hashes: dict[str, str] = {}
        self._file: _HashedFile | None = None

    def add(self, key: str, tensor: Tensor, shape: Sequence[int], index: int | None) -> None:
        """Write a tensor of this global shape, or slice `index` of it (without the first axis)."""
        tensor = tensor.detach().contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            # torch.save writes the whole storage of a view.
            tensor = tensor.clone()
        offset = [0] * len(shape)
        if index is not None:
            tensor, offset[0] = tensor.unsqueeze(0), index
        known = self._tensors.setdefault(key, _describe(tensor.dtype, shape))
        assert isinstance(known, TensorStorageMetadata), f"{key} is no tensor"
        assert known.properties.dtype == tensor.dtype, f"{key} has slices of several dtypes"
        known.chunks.append(ChunkStorageMetadata(torch.Size(offset), tensor.shape))
        self._write(MetadataIndex(key, torch.Size(offset)), tensor)

    def adopt(self, source: TensorReader, key: str) -> None:
        """Enter a tensor of another checkpoint whose data files are in this folder too."""
        self._tensors[key], places = source.places(key)
        self._places |= places

    def add_object(self, key: str, value: Any, offset: int = 0, count: int = 1) -> None:
        """Write an object as megatron-core's `ShardedObject` of `count` parts, part `offset`."""
        name = f"{key}/shard_{offset}_{count}"
        self._tensors[name] = BytesStorageMetadata()
        self._write(MetadataIndex(name), [value])

    def finish(self) -> None:
        """Write the index; without it the folder is no checkpoint."""
        if self._file is not None:
            self._close_file(self._file)
        metadata = Metadata(self._tensors, storage_data=self._places, storage_meta=StorageMeta())
        self._put(TENSORS_FILE, pickle.dumps(metadata))
        config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        self._put(FORMAT_FILE, json.dumps(config).encode())

    def finish_manifest(self) -> None:
        """Write megatron-core's integrity manifest over every file of the folder."""
        for path in self._folder.iterdir():
            if path.name not in self._hashes:
                self._hashes[path.name] = file_digest(path)
        manifest = {"algorithm": "sha256", "files": dict(sorted(self._hashes.items()))}
        self._put(MANIFEST_FILE, json.dumps(manifest, indent=2).encode())

    def _write(self, index: MetadataIndex, value: object) -> None:
        if self._file is None:
            self._file = _HashedFile(self._folder / f"{self._prefix}_{len(self._hashes)}.distcp")
        begin = self._file.position
        record = io.BytesIO()
        torch.save(value, record)
        with record.getbuffer() as content:
            self._file.write(content)
        self._places[index] = _StorageInfo(self._file.path.name, begin, self._file.position - begin)
        if self._file.position >= _FILE_BYTES:
            self._close_file(self._file)

    def _close_file(self, file: _HashedFile) -> None:
        self._hashes[file.path.name] = file.close()
        self._file = None

    def _put(self, name: str, content: bytes) -> None:
        (self._folder / name).write_bytes(content)


class _HashedFile:
    """A file that knows its SHA-256 without being read again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0
        self._stream: BinaryIO = path.open("wb")
        self._hash = hashlib.sha256()

    def write(self, data: memoryview) -> None:
        self._stream.write(data)
        self._hash.update(data)
        self.position += len(data)

    def close(self) -> str:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        return self._hash.hexdigest()


def _describe(dtype: torch.dtype, shape: Sequence[int]) -> TensorStorageMetadata:
    return TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), [])
