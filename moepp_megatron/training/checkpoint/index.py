"""The index of a checkpoint's tensors, `.metadata`, rebuilt from plain values.

torch.distributed.checkpoint reads this file with plain `pickle` (filesystem.py), which runs
whatever it asks for. Checksums do not help: who can write the file can write the manifest. So torch
never reads it: here its values are checked one by one, and the index is built again from them.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint import BytesStorageMetadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from moepp_megatron.config.regular_file import check_regular
from moepp_megatron.file_names import TENSORS_FILE
from moepp_megatron.training.checkpoint.plain_pickle import (
    MAX_BYTES,
    Description,
    Name,
    UnsafePickleError,
    read_plain,
)

_RECORDS = "torch.distributed.checkpoint.metadata"
_PLANNER = "torch.distributed.checkpoint.planner"
_STORAGE_INFO = Name("torch.distributed.checkpoint.filesystem", "_StorageInfo")
_SIZE = Name("torch", "Size")
# Only a name here, as all of them; torch's pickles give the memory layout in this way.
_LAYOUT = Name("torch.serialization", "_get_layout")
_FORMAT = Name(_RECORDS, "_MEM_FORMAT_ENCODING")
_KNOWN = {_STORAGE_INFO, _SIZE, _LAYOUT, _FORMAT, Name("collections", "OrderedDict")}
_KNOWN |= {
    Name(_RECORDS, name)
    for name in (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "BytesStorageMetadata",
        "StorageMeta",
    )
}
# Left out of what is read: plans of all ranks, which torch's own writer keeps, and where the
# checkpoint was written. pathlib._local is Python 3.13's.
_KNOWN |= {
    Name(_PLANNER, name)
    for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
}
_KNOWN |= {
    Name(module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "Path")
}


def read_metadata(checkpoint: Path) -> Metadata:
    """The index of a checkpoint's tensors: only what torch needs to read them.

    Raises:
        UnsafePickleError: The file is not only an index, or it places bytes outside of the folder.
        OSError: It cannot be read.
    """
    check_regular(checkpoint / TENSORS_FILE)
    with (checkpoint / TENSORS_FILE).open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    try:
        value = read_plain(content, _is_known)
    except UnsafePickleError as error:
        raise UnsafePickleError(f"{TENSORS_FILE} {error}") from error
    if not isinstance(value, Description) or value.kind != Name(_RECORDS, "Metadata"):
        what = value.kind.name if isinstance(value, Description) else type(value).__name__
        raise UnsafePickleError(f"{TENSORS_FILE} holds a {what}, not an index")
    fields = _fields(value, "Metadata")
    metadata = Metadata(
        state_dict_metadata={
            _text(key): _entry(entry)
            for key, entry in _dictionary(fields.get("state_dict_metadata")).items()
        },
        storage_data={
            _index(key): _place(place)
            for key, place in _dictionary(fields.get("storage_data")).items()
        },
    )
    _check_lengths(metadata)
    return metadata


def _check_lengths(metadata: Metadata) -> None:
    """Refuse a shard larger than its stored bytes: reading it would allocate that much."""
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        for chunk in entry.chunks:
            place = metadata.storage_data.get(MetadataIndex(key, chunk.offsets))
            size = math.prod(chunk.sizes) * entry.properties.dtype.itemsize
            if place is not None and place.length < size:
                _damaged(f"{place.length} bytes hold a shard of {size}")


def _is_known(name: Name) -> bool:
    if name.module == "torch" and isinstance(getattr(torch, name.name, None), torch.dtype):
        return True
    return name in _KNOWN


def _damaged(what: str) -> NoReturn:
    raise UnsafePickleError(f"{TENSORS_FILE} is damaged ({what})")


def _fields(value: Any, kind: str, module: str = _RECORDS) -> Mapping[str, Any]:
    """The fields of a dataclass, as its instances are pickled."""
    if not isinstance(value, Description) or value.kind != Name(module, kind):
        _damaged(f"something else in place of a {kind}")
    # Without fields there is no state.
    return _dictionary({} if value.state is None else value.state)


def _exactly[T](kind: type[T], value: Any, what: str) -> T:
    if type(value) is not kind:
        _damaged(f"something else in place of a {what}")
    return value


def _dictionary(value: Any) -> dict[Any, Any]:
    return _exactly(dict, value, "dictionary")


def _text(value: Any) -> str:
    return _exactly(str, value, "name")


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        _damaged("something else in place of a count")
    return value


def _size(value: Any) -> torch.Size:
    if (
        not isinstance(value, Description)
        or value.kind != _SIZE
        or len(value.args) != 1
        or type(value.args[0]) is not tuple
    ):
        _damaged("something else in place of a size")
    return torch.Size([_count(length) for length in value.args[0]])


def _entry(value: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if isinstance(value, Description) and value.kind == Name(_RECORDS, "BytesStorageMetadata"):
        return BytesStorageMetadata()
    fields = _fields(value, "TensorStorageMetadata")
    size, chunks = _size(fields.get("size")), _exactly(list, fields.get("chunks"), "list")
    properties = TensorProperties(dtype=_dtype(fields.get("properties")))
    return TensorStorageMetadata(properties, size, [_chunk(chunk, size) for chunk in chunks])


def _dtype(properties: Any) -> torch.dtype:
    """The data type out of a tensor's properties; the others are torch's defaults in a file."""
    if (
        not isinstance(properties, Description)
        or properties.kind != Name(_RECORDS, "TensorProperties")
        or type(properties.state) is not tuple
        or len(properties.state) not in (5, 6)
    ):
        _damaged("something else in place of a tensor's properties")
    name, layout = properties.state[:2]
    dtype = getattr(torch, name.name, None) if isinstance(name, Name) else None
    if not isinstance(dtype, torch.dtype):
        _damaged("something else in place of a data type")
    if not isinstance(layout, Description) or layout.args != ("torch.strided",):
        _damaged("a tensor that is not strided")
    return dtype


def _chunk(value: Any, size: torch.Size) -> ChunkStorageMetadata:
    fields = _fields(value, "ChunkStorageMetadata")
    offsets, sizes = _size(fields.get("offsets")), _size(fields.get("sizes"))
    is_inside = len(offsets) == len(sizes) == len(size) and all(
        begin + length <= whole for begin, length, whole in zip(offsets, sizes, size, strict=True)
    )
    if not is_inside:
        _damaged("a shard outside of its tensor")
    return ChunkStorageMetadata(offsets, sizes)


def _index(value: Any) -> MetadataIndex:
    fields = _fields(value, "MetadataIndex")
    offset, index = fields.get("offset"), fields.get("index")
    return MetadataIndex(
        _text(fields.get("fqn")), _optional(_size, offset), _optional(_count, index)
    )


def _optional[T](read: Callable[[Any], T], value: Any) -> T | None:
    return None if value is None else read(value)


def _place(value: Any) -> _StorageInfo:
    fields = _fields(value, _STORAGE_INFO.name, _STORAGE_INFO.module)
    name = _text(fields.get("relative_path"))
    if name in ("", ".", "..") or Path(name).name != name or "\0" in name:
        raise UnsafePickleError(f"{TENSORS_FILE} places bytes outside of the folder: {name!r}")
    if fields.get("transform_descriptors"):
        raise UnsafePickleError(f"{TENSORS_FILE} wants bytes of {name} decoded by an extension")
    return _StorageInfo(name, _count(fields.get("offset")), _count(fields.get("length")))
