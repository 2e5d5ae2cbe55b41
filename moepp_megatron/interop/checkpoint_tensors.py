"""Reads and writes checkpoints in megatron-core's distributed format, one tensor at a time.

megatron-core does both from a model in memory, in process groups. Here every tensor comes in turn,
so a model of any size passes through the memory of one tensor. The files are those of
`torch.distributed.checkpoint` (a pickled index `.metadata` and data files of `torch.save` records),
which is what megatron-core's `torch_dist` format is.
"""

import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Iterable, Mapping, Sequence
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

from moepp_megatron.config import Config, ConfigError
from moepp_megatron.file_names import CONFIG_FILE, FORMAT_FILE, MANIFEST_FILE, TENSORS_FILE
from moepp_megatron.interop.tensor_rules import differences, linear_modules, moepp_rules
from moepp_megatron.training.checkpoint.data_only import refuse_packed
from moepp_megatron.training.checkpoint.files import file_digest
from moepp_megatron.training.checkpoint.plain_pickle import UnsafePickleError, read_metadata

_WEIGHTS = ("embedding.", "decoder.", "output_layer.")


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
        entry = self._entry(key)
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

    def weight_names(self, config: Config) -> list[str]:
        """The model's tensors; ConfigError names missing and unexpected ones and other shapes."""
        tensors = self.tensors
        wanted = {rule.key: rule.shape for rule in moepp_rules(config) if not rule.unused}
        weights = {name: shape for name, (_, shape) in tensors.items() if name.startswith(_WEIGHTS)}
        if problems := differences(wanted, weights, "the arguments"):
            more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
            raise ConfigError(
                f"{self.folder}: {problems[0]}{more}; name a checkpoint of the model that its "
                "arguments describe"
            )
        return list(wanted)

    def read_bytes(self, key: str) -> bytes:
        """The bytes of the object stored under `key`; KeyError if there is none."""
        return self._bytes(MetadataIndex(f"{key}/shard_0_1"))

    def places(self, key: str) -> tuple[TensorStorageMetadata, dict[MetadataIndex, _StorageInfo]]:
        """A tensor's dtype, shape and pieces, and the bytes of the files that hold each piece."""
        entry = self._entry(key)
        pieces = (MetadataIndex(key, chunk.offsets) for chunk in entry.chunks)
        return entry, {piece: self._metadata.storage_data[piece] for piece in pieces}

    def _entry(self, key: str) -> TensorStorageMetadata:
        entry = self._metadata.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata), f"{key} is no tensor"
        return entry

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


# Data of about this size goes into one file, so that many readers can work side by side.
_FILE_BYTES = 2 * 1024**3


class ConvertedCheckpointWriter:
    """Writes tensors, or slices of them along the first axis, in any order.

    `folder` has nothing of a checkpoint's tensors; the names of new data files begin with `prefix`.
    """

    def __init__(self, folder: Path, prefix: str = "__0") -> None:
        self._folder = folder
        self._prefix = prefix
        self._tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._hashes: dict[str, str] = {}
        self._file: BinaryIO | None = None

    def add(self, key: str, tensor: Tensor, shape: Sequence[int], index: int | None) -> None:
        """Write a tensor of this global shape, or slice `index` of it (without the first axis)."""
        tensor = tensor.detach().contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            # torch.save writes the whole storage of a view.
            tensor = tensor.clone()
        offset = [0] * len(shape)
        if index is not None:
            tensor, offset[0] = tensor.unsqueeze(0), index
        properties = TensorProperties(dtype=tensor.dtype)
        described = TensorStorageMetadata(properties, torch.Size(shape), [])
        known = self._tensors.setdefault(key, described)
        assert isinstance(known, TensorStorageMetadata), f"{key} is no tensor"
        assert known.properties.dtype == tensor.dtype, f"{key} has slices of several dtypes"
        known.chunks.append(ChunkStorageMetadata(torch.Size(offset), tensor.shape))
        self._write(MetadataIndex(key, torch.Size(offset)), tensor)

    def adopt(self, source: TensorReader, keys: Iterable[str]) -> None:
        """Enter tensors of another checkpoint, whose data files become links here, or copies."""
        files = set()
        for key in keys:
            self._tensors[key], places = source.places(key)
            self._places |= places
            files |= {place.relative_path for place in places.values()}
        for file in sorted(files):
            path = (source.folder / file).resolve()
            try:
                os.link(path, self._folder / file)
            except OSError:
                # Another file system, or one without links.
                shutil.copyfile(path, self._folder / file)

    def add_object(self, key: str, value: Any, offset: int = 0, count: int = 1) -> None:
        """Write an object as megatron-core's `ShardedObject` of `count` parts, part `offset`."""
        name = f"{key}/shard_{offset}_{count}"
        self._tensors[name] = BytesStorageMetadata()
        self._write(MetadataIndex(name), [value])

    def add_objects(self, config: Config, common: Mapping[str, Any] | None = None) -> None:
        """Write the objects, besides tensors, that megatron-core requires in every checkpoint.

        `common` is state that is not sharded; None for none.
        """
        for module, count in linear_modules(config):
            for part in range(count):
                self.add_object(f"{module}._extra_state", None, part, count)
        # No optimizer, schedule or progress: training starts those anew (training/checkpoint.py).
        self.add_object("common_state", dict(common or {}))

    def complete(self, config: Config, origin: str) -> None:
        """Make a checkpoint of ours of the folder, which has all else, tensors included."""
        self.add_objects(config)
        self._put(CONFIG_FILE, config.to_yaml(f"converted from {origin}").encode())
        self.finish()
        # megatron-core's integrity manifest, over every file.
        for path in self._folder.iterdir():
            if path.name not in self._hashes:
                self._hashes[path.name] = file_digest(path)
        manifest = {"algorithm": "sha256", "files": dict(sorted(self._hashes.items()))}
        self._put(MANIFEST_FILE, json.dumps(manifest, indent=2).encode())

    def finish(self) -> None:
        """Write the index; without it the folder is no checkpoint."""
        self._close_file()
        metadata = Metadata(self._tensors, storage_data=self._places, storage_meta=StorageMeta())
        self._put(TENSORS_FILE, pickle.dumps(metadata))
        config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        self._put(FORMAT_FILE, json.dumps(config).encode())

    def _write(self, index: MetadataIndex, value: object) -> None:
        if self._file is None:
            path = self._folder / f"{self._prefix}_{len(self._hashes)}.distcp"
            self._file, self._hash = path.open("wb"), hashlib.sha256()
        begin = self._file.tell()
        record = io.BytesIO()
        torch.save(value, record)
        with record.getbuffer() as content:
            self._file.write(content)
            self._hash.update(content)
        end = self._file.tell()
        self._places[index] = _StorageInfo(Path(self._file.name).name, begin, end - begin)
        if end >= _FILE_BYTES:
            self._close_file()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._hashes[Path(self._file.name).name] = self._hash.hexdigest()
            self._file = None

    def _put(self, name: str, content: bytes) -> None:
        (self._folder / name).write_bytes(content)
