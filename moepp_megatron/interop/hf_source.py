"""A Hugging Face checkpoint folder: its configuration, and its tensors in the safetensors format.

The safetensors library maps whole files (which then count as this process's memory) and writes from
a dictionary that holds every tensor of a shard. A conversion of a model that does not fit in memory
can do neither. The format is small: 8 bytes header length, a JSON header, the tensors' bytes.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moepp_megatron.config import ConfigError, json_file
from moepp_megatron.config.errors import raise_problems
from moepp_megatron.config.paths import looked_at
from moepp_megatron.config.regular_file import check_regular
from moepp_megatron.file_names import MODEL_CONFIG_FILE, PICKLES_INDEX_FILE, SAFETENSORS_INDEX_FILE
from moepp_megatron.interop.tensor_rules import TensorRule, differences

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


class HFSource:
    """The tensors of a checkpoint folder, all files checked, none read.

    The folder holds `config.json` and `model.safetensors`, or shards with an index.
    `allow_pickle` also accepts `pytorch_model.bin`, read with `weights_only`.

    Raises:
        ConfigError: If a file is missing, truncated, or contradicts the index.
    """

    def __init__(self, folder: Path, allow_pickle: bool = False) -> None:
        self.folder = folder
        self.config = read_json(folder / MODEL_CONFIG_FILE)
        # Those of pickles are mapped.
        self._entries: dict[str, _TensorEntry | Tensor] = {}
        index = folder / SAFETENSORS_INDEX_FILE
        if index.is_file():
            self._open_shards(index)
        elif (folder / "model.safetensors").is_file():
            self._entries |= _read_header(folder / "model.safetensors")
        else:
            self._open_pickles(allow_pickle)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the folder by name, without its data."""
        return {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            for name, tensor in self._entries.items()
        }

    def leave_out(self, names: Iterable[str]) -> None:
        """Forget tensors, as if the folder did not have them."""
        for name in names:
            del self._entries[name]

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        entry = self._entries[name]
        return _read_tensor(entry) if isinstance(entry, _TensorEntry) else entry

    def account_for(self, rules: Sequence[TensorRule]) -> None:
        """Refuse (ConfigError) a checkpoint that does not hold exactly what the rules read."""
        tensors = self.tensors
        wanted = {name: shape for rule in rules for name, shape in rule.sources.items()}
        optional = {name for rule in rules if rule.unused for name in rule.sources}
        found = {name: tensor.shape for name, tensor in tensors.items()}
        problems = differences(wanted, found, "config.json", optional)
        for rule in rules:
            dtypes = {tensors[name].dtype for name in rule.sources if name in tensors}
            if len(dtypes) > 1:
                names = ", ".join(rule.sources)
                problems.append(f"tensors {names} must have one dtype; use --dtype fp32 or bf16")
        raise_problems(f"{self.folder}: {problem}" for problem in problems)

    def _open_shards(self, index: Path) -> None:
        content = read_json(index)
        weight_map = _weight_map(index, content)
        for file in sorted(set(weight_map.values())):
            path = _within(self.folder, index, file)
            for name, entry in _read_header(path).items():
                if weight_map.get(name) != file:
                    raise ConfigError(
                        f"{index} places tensor {name} in {weight_map.get(name)}, but it is in "
                        f"{file}; fetch the index and the shards of one checkpoint"
                    )
                self._entries[name] = entry
        missing = sorted(weight_map.keys() - self._entries.keys())
        if missing:
            raise ConfigError(
                f"{self.folder / weight_map[missing[0]]} must hold tensor {missing[0]} by "
                f"{index.name} and does not; fetch the index and the shards of one checkpoint"
            )
        stated = (content.get("metadata") or {}).get("total_size")
        total = sum(tensor.nbytes for tensor in self.tensors.values())
        if stated is not None and stated != total:
            raise ConfigError(
                f"{index}: metadata.total_size ({stated}) must be the shards' sum ({total}); fetch "
                "the checkpoint again, or remove total_size if you trust the shards"
            )

    def _open_pickles(self, allow_pickle: bool) -> None:
        index = self.folder / PICKLES_INDEX_FILE
        files = [self.folder / "pytorch_model.bin"]
        if index.is_file():
            names = sorted(set(_weight_map(index, read_json(index)).values()))
            files = [_within(self.folder, index, name) for name in names]
        if not all(file.is_file() for file in files):
            raise ConfigError(
                f"{self.folder} must hold model.safetensors, or shards with "
                "model.safetensors.index.json; name a checkpoint folder"
            )
        if not allow_pickle:
            raise ConfigError(
                f"{files[0]} holds pickled weights, which can run code when they are read; "
                "use safetensors, or --allow-pickle if you trust the source"
            )
        for file in files:
            try:
                loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:
                reason = str(error).splitlines()[0]
                raise ConfigError(f"{file} cannot be read as plain weights: {reason}") from None
            for name, tensor in loaded.items():
                if not torch.is_tensor(tensor) or name in self._entries:
                    raise ConfigError(f"{file} must hold tensors only, each once; {name} is not")
                self._entries[name] = tensor


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ConfigError if it cannot be read or is not an object."""
    try:
        content = json_file.read_json(path)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}){looked_at(path)}; name the folder "
            "of a Hugging Face model"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path} must be JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must be a JSON object; fetch it again")
    return content


def _weight_map(index: Path, content: dict[str, Any]) -> dict[str, str]:
    weight_map = content.get("weight_map")
    valid = isinstance(weight_map, dict) and all(isinstance(f, str) for f in weight_map.values())
    if not valid or not weight_map:
        raise ConfigError(f"{index} must have a weight_map from tensors to files; fetch it again")
    return dict(weight_map)


def _within(folder: Path, index: Path, name: str) -> Path:
    """A shard's path; names that leave the folder are refused."""
    if name != Path(name).name or name in ("", ".", ".."):
        raise ConfigError(f"{index} must name files of its own folder, not {name!r}")
    return folder / name


@dataclass(frozen=True)
class _TensorEntry:
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


def _read_header(file: Path) -> dict[str, _TensorEntry]:
    """The tensors of a file by its header, which must not contradict itself or the file's size."""
    try:
        check_regular(file)
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER):
                raise _broken(file, f"has {size} bytes, too few for its header of {length}")
            header = json_file.parse_json(stream.read(length), json_file.MAX_VALUES)
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
) -> dict[str, _TensorEntry]:
    entries: list[_TensorEntry] = []
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
        entries.append(_TensorEntry(name, dtype, shape, file, start + begin))
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


def _read_tensor(entry: _TensorEntry) -> Tensor:
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
    weight_map = {}
    for file, shard in zip(files, shards, strict=True):
        with (folder / file).open("wb") as stream:
            stream.write(_header(shard))
            for planned in shard:
                tensor = next(tensors)
                given = (planned[0], tensor.dtype, tuple(tensor.shape))
                assert given == planned, f"planned {planned}, given {given}"
                weight_map[planned[0]] = file
                if tensor.numel():
                    stream.write(tensor.contiguous().view(-1).view(torch.uint8).numpy())
            stream.flush()
            os.fsync(stream.fileno())
    assert next(tensors, None) is None, "there are more tensors than planned"
    if len(shards) > 1:
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
