"""Reads tensors of our checkpoints one at a time, without a model and without process groups."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from moepp_megatron.config import ConfigError
from moepp_megatron.file_names import TENSORS_FILE
from moepp_megatron.training.checkpoint.data_only import refuse_packed
from moepp_megatron.training.checkpoint.index import read_metadata
from moepp_megatron.training.checkpoint.plain_pickle import UnsafePickleError


class TensorReader:
    """The tensors of a checkpoint folder by name.

    ConfigError if its index cannot be read, or the data files are shorter than it says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metadata = _read_index(folder)
        self._check_files()

    @property
    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every tensor."""
        return {
            key: (entry.properties.dtype, tuple(entry.size))
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def read(self, key: str, index: int | None = None) -> Tensor:
        """Read a tensor, or slice `index` of it along the first axis, whatever layout wrote it."""
        entry = self._metadata.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata), f"{key} is no tensor"
        begin, end = (0, entry.size[0]) if index is None else (index, index + 1)
        target = torch.empty((end - begin, *entry.size[1:]), dtype=entry.properties.dtype)
        for chunk in entry.chunks:
            first = max(begin, chunk.offsets[0])
            last = min(end, chunk.offsets[0] + chunk.sizes[0])
            if first >= last:
                continue
            record = self._record(MetadataIndex(key, chunk.offsets))
            part = record.view(torch.Size(chunk.sizes))
            part = part[first - chunk.offsets[0] : last - chunk.offsets[0]]
            _place(target, chunk)[first - begin : last - begin].copy_(part)
        return target if index is None else target[0]

    def read_bytes(self, key: str) -> bytes:
        """The bytes of the object stored under `key`; KeyError if there is none."""
        return self._bytes(MetadataIndex(f"{key}/shard_0_1"))

    def places(self, key: str) -> tuple[TensorStorageMetadata, dict[MetadataIndex, _StorageInfo]]:
        """A tensor's dtype, shape and pieces, and the bytes of the files that hold each piece."""
        entry = self._metadata.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata), f"{key} is no tensor"
        pieces = (MetadataIndex(key, chunk.offsets) for chunk in entry.chunks)
        return entry, {piece: self._metadata.storage_data[piece] for piece in pieces}

    def _record(self, index: MetadataIndex) -> Any:
        data = io.BytesIO(self._bytes(index))
        try:
            refuse_packed(data)
        except UnsafePickleError as error:
            raise ConfigError(
                f"{self.folder}: tensor {index.fqn} {error}; do not use this checkpoint"
            ) from None
        return torch.load(data, map_location="cpu", weights_only=True)

    def _bytes(self, index: MetadataIndex) -> bytes:
        place = self._metadata.storage_data[index]
        with (self.folder / place.relative_path).open("rb", buffering=0) as stream:
            stream.seek(place.offset)
            return stream.read(place.length)

    def _check_files(self) -> None:
        needed: dict[str, int] = {}
        for place in self._metadata.storage_data.values():
            end = place.offset + place.length
            needed[place.relative_path] = max(needed.get(place.relative_path, 0), end)
        for name, end in needed.items():
            file = self.folder / name
            size = file.stat().st_size if Path(name).name == name and file.is_file() else 0
            if size < end:
                raise ConfigError(
                    f"{file} must have at least {end} bytes by the checkpoint's index and has "
                    f"{size}; it is truncated or changed: copy the checkpoint again"
                )


def _place(target: Tensor, chunk: ChunkStorageMetadata) -> Tensor:
    """The part of `target` that a chunk covers on every axis but the first."""
    for axis in range(1, target.dim()):
        target = target.narrow(axis, chunk.offsets[axis], chunk.sizes[axis])
    return target


def _read_index(folder: Path) -> Metadata:
    """The index of a checkpoint (else ConfigError); no code in the file is run."""
    file = folder / TENSORS_FILE
    try:
        return read_metadata(folder)
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be read ({error.strerror}); name a checkpoint folder"
        ) from None
    except UnsafePickleError as error:
        raise ConfigError(
            f"{file} must be an index of torch.distributed.checkpoint: {error}; do not use this "
            "checkpoint unless you know where it comes from"
        ) from None
