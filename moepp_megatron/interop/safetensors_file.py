"""Reads and writes the safetensors format, one tensor at a time.

The safetensors library maps whole files (which then count as this process's memory) and writes from
a dictionary that holds every tensor of a shard. A conversion of a model that does not fit in memory
can do neither. The format is small: 8 bytes header length, a JSON header, the tensors' bytes.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moepp_megatron.config import ConfigError
from moepp_megatron.config.json_file import MAX_VALUES, parse_json
from moepp_megatron.config.regular_file import check_regular
from moepp_megatron.file_names import SAFETENSORS_INDEX_FILE

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# Name, dtype and shape of a tensor.
Planned = tuple[str, torch.dtype, tuple[int, ...]]
# The library's own limit.
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorEntry:
    """One tensor in a file; `offset` is its first byte there."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return _num_bytes(self.dtype, self.shape)


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of a file, checked against its size; nothing but the header is read.

    ConfigError if the file is truncated, or its header contradicts itself or its size.
    """
    try:
        check_regular(file)
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER):
                raise _broken(file, f"has {size} bytes, too few for its header of {length}")
            header = parse_json(stream.read(length), MAX_VALUES)
    except OSError as error:
        raise _broken(file, f"cannot be read ({error.strerror})") from None
    except ConfigError:
        raise
    except ValueError as error:
        raise _broken(file, f"has a header that cannot be read ({error})") from None
    if not isinstance(header, dict):
        raise _broken(file, "has a header that is no JSON object")
    header.pop("__metadata__", None)
    return _entries(file, header, 8 + length, size)


def _entries(
    file: Path, header: Mapping[str, object], start: int, size: int
) -> dict[str, TensorEntry]:
    entries: list[TensorEntry] = []
    for name, value in header.items():
        try:
            assert isinstance(value, dict)
            dtype, shape = _DTYPES[value["dtype"]], tuple(value["shape"])
            begin, end = value["data_offsets"]
            assert all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        except (AssertionError, KeyError, TypeError, ValueError):
            raise _broken(file, f"has no valid entry for tensor {name}") from None
        if end - begin != _num_bytes(dtype, shape):
            raise _broken(
                file, f"gives tensor {name} {end - begin} bytes for shape {list(shape)} {dtype}"
            )
        entries.append(TensorEntry(name, dtype, shape, file, start + begin))
    entries.sort(key=lambda entry: (entry.offset, entry.num_bytes))
    position = start
    for entry in entries:
        if entry.offset != position:
            raise _broken(file, f"has a gap or an overlap before tensor {entry.name}")
        position += entry.num_bytes
    if position != size:
        raise _broken(file, f"must have {position} bytes by its header and has {size}")
    return {entry.name: entry for entry in entries}


def _num_bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    return dtype.itemsize * math.prod(shape)


def _broken(file: Path, what: str) -> ConfigError:
    return ConfigError(f"{file} {what}; it is truncated or changed: fetch or write it again")


def read_tensor(entry: TensorEntry) -> Tensor:
    """Read one tensor into memory of its own; ConfigError if the file ends early."""
    data = torch.empty(entry.shape, dtype=entry.dtype)
    if entry.num_bytes == 0:
        return data
    with entry.file.open("rb", buffering=0) as stream:
        stream.seek(entry.offset)
        view = memoryview(data.view(-1).view(torch.uint8).numpy())
        while view:
            count = stream.readinto(view)
            if not count:
                raise _broken(entry.file, f"ends within tensor {entry.name}")
            view = view[count:]
    return data


def write_tensors(
    folder: Path, plan: Sequence[Planned], tensors: Iterator[Tensor], max_shard_bytes: int
) -> None:
    """Write tensors in the order of their plan into shards of limited size, with an index.

    `plan` has name, dtype and shape of each. A tensor larger than `max_shard_bytes` gets its own
    shard.
    """
    shards = _split(plan, max_shard_bytes)
    files = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    if len(shards) == 1:
        files = ["model.safetensors"]
    for file, shard in zip(files, shards, strict=True):
        with (folder / file).open("wb") as stream:
            stream.write(_header(shard))
            for planned in shard:
                tensor = next(tensors)
                given = (planned[0], tensor.dtype, tuple(tensor.shape))
                assert given == planned, f"planned {planned}, given {given}"
                if tensor.numel():
                    stream.write(tensor.contiguous().view(-1).view(torch.uint8).numpy())
            stream.flush()
            os.fsync(stream.fileno())
    assert next(tensors, None) is None, "there are more tensors than planned"
    if len(shards) > 1:
        weight_map = {
            name: file for file, shard in zip(files, shards, strict=True) for name, _, _ in shard
        }
        total = sum(_num_bytes(dtype, shape) for _, dtype, shape in plan)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True)
        (folder / SAFETENSORS_INDEX_FILE).write_text(text + "\n", encoding="utf-8")


def _split(plan: Sequence[Planned], limit: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = []
    room = 0
    for item in plan:
        size = _num_bytes(item[1], item[2])
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(item)
        room -= size
    return shards


def _header(shard: Sequence[Planned]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape in shard:
        end = position + _num_bytes(dtype, shape)
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    # Padded so that the tensors begin at a multiple of 8 bytes, as the library does.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
