"""Reads pickles of a checkpoint as plain values, without creating any of their objects.

A pickle is a program: what one of its names means may depend on what ran before, even on an
earlier reading of the same bytes. So nothing here is looked up, called or changed. Names stay
names, objects stay descriptions, and instructions that data do not need are refused.

torch.distributed.checkpoint reads the index of a checkpoint's tensors, `.metadata`, with plain
`pickle` (filesystem.py), which runs whatever it asks for. Checksums do not help: who can write the
file can write the manifest. So torch never reads it: here its values are checked one by one, and
the index is built again from them.
"""

import math
import pickletools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

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

# The index of a checkpoint has about 200 bytes for each shard of a tensor, and a model of 58 layers
# of 256 experts with its optimizer has 190,000 shards. The values of 40 MB take 400 MB.
MAX_BYTES = 1 << 26
_MAX_MEMORY = 5 << 27
# Python's pickler empties its stack after each thousand items of a list or dictionary.
_MAX_STACK = 100_000
_MAX_MARKS = 100
_MAX_INT = 1 << 63


class UnsafePickleError(ValueError):
    """A pickle holds something that is not data."""


@dataclass(frozen=True)
class Name:
    """A class or function that the pickle names."""

    module: str
    name: str

    def __str__(self) -> str:
        """The name in Python's notation."""
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True)
class Description:
    """An object that the pickle describes; compared and hashed by identity.

    It is the result of `kind(*args)` with `state` set on it; items put into it are left out.
    """

    kind: Name
    args: tuple[Any, ...]
    state: Any = None


def read_plain(content: bytes, is_known: Callable[[Name], bool]) -> Any:
    """Return the values that a pickle of protocol 4 or 5 describes; its names must be known.

    They are numbers, text, bytes, None, tuples, lists, dictionaries, names and descriptions; they
    may be shared, or contain themselves. UnsafePickleError if the pickle is damaged, too large, or
    holds something that is not data.
    """
    if len(content) > MAX_BYTES:
        raise UnsafePickleError(f"is too large ({len(content)} bytes, at most {MAX_BYTES})")
    machine = _Machine(is_known)
    try:
        for opcode, operand, _ in pickletools.genops(content):
            action = _ACTIONS.get(opcode.name)
            if action is None:
                raise UnsafePickleError(f"uses the instruction {opcode.name}, which no data need")
            action(machine, operand)
            if len(machine.stack) > _MAX_STACK or len(machine.marks) > _MAX_MARKS:
                raise UnsafePickleError("is nested too deeply")
        (result,) = machine.stack
    except UnsafePickleError:
        raise
    # Whatever the decoder, or an instruction without its operands, raises for damaged bytes.
    except (ValueError, TypeError, IndexError, KeyError, OverflowError) as error:
        raise UnsafePickleError(f"cannot be read ({error})") from error
    return result


class _Machine:
    """The stack of an unpickler, with the instructions that data need."""

    def __init__(self, is_known: Callable[[Name], bool]) -> None:
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self._memo: list[Any] = []
        self._memory = 0
        self._is_known = is_known

    def _take(self, num_bytes: int) -> None:
        """Count memory of values: a few bytes of a pickle may make many of them."""
        self._memory += num_bytes
        if self._memory > _MAX_MEMORY:
            raise UnsafePickleError(f"holds values of more than {_MAX_MEMORY >> 20} MiB")

    def ignore(self, _: Any) -> None:
        """Do nothing: the protocol's number, a frame, the end."""

    def push(self, value: Any) -> None:
        """A number, text or bytes."""
        if type(value) is int and abs(value) >= _MAX_INT:
            raise UnsafePickleError("holds a number of more than 64 bits")
        self._take(sys.getsizeof(value))
        self.stack.append(value)

    def mark(self, _: Any) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def items(self) -> list[Any]:
        """Pop the items since the last mark."""
        items, self.stack = self.stack, self.marks.pop()
        return items

    def tuple_of(self, length: int) -> None:
        if len(self.stack) < length:
            raise UnsafePickleError("cannot be read (a tuple lacks items)")
        items = self.stack[len(self.stack) - length :]
        del self.stack[len(self.stack) - length :]
        self.push(tuple(items))

    def extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise UnsafePickleError("appends to what is not a list")
        before = sys.getsizeof(self.stack[-1])
        self.stack[-1].extend(items)
        self._take(sys.getsizeof(self.stack[-1]) - before)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        target = {} if type(target) is Description else target
        if type(target) is not dict or len(items) % 2:
            raise UnsafePickleError("sets items of what is not a dictionary")
        before = sys.getsizeof(target)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int, Description):
                raise UnsafePickleError(f"has a {type(key).__name__} as a key")
            target[key] = value
        self._take(sys.getsizeof(target) - before)

    def last(self, count: int) -> list[Any]:
        return [self.stack.pop() for _ in range(count)][::-1]

    def memoize(self, _: Any) -> None:
        self._take(8)
        self._memo.append(self.stack[-1])

    def recall(self, index: int) -> None:
        self.stack.append(self._memo[index])

    def name(self, _: Any) -> None:
        module, name = self.last(2)
        if type(module) is not str or type(name) is not str:
            raise UnsafePickleError("computes a name")
        found = Name(module, name)
        if not self._is_known(found):
            raise UnsafePickleError(f"asks for {found}, which no checkpoint contains")
        self.push(found)

    def describe(self, _: Any) -> None:
        kind, args = self.last(2)
        if type(kind) is not Name or type(args) is not tuple:
            raise UnsafePickleError("calls what is not a name")
        self.push(Description(kind, args))

    def build(self, _: Any) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is not Description or target.state is not None:
            raise UnsafePickleError("changes what it did not make")
        target.state = state


_LITERALS = (
    "BININT BININT1 BININT2 LONG1 BINFLOAT SHORT_BINUNICODE BINUNICODE SHORT_BINBYTES BINBYTES"
)
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), _Machine.ignore),
    **dict.fromkeys(_LITERALS.split(), _Machine.push),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "MARK": _Machine.mark,
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.items())),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "APPEND": lambda machine, _: machine.extend(machine.last(1)),
    "APPENDS": lambda machine, _: machine.extend(machine.items()),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "SETITEM": lambda machine, _: machine.set_items(machine.last(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.items()),
    "MEMOIZE": _Machine.memoize,
    "BINGET": _Machine.recall,
    "LONG_BINGET": _Machine.recall,
    "STACK_GLOBAL": _Machine.name,
    "REDUCE": _Machine.describe,
    "NEWOBJ": _Machine.describe,
    "BUILD": _Machine.build,
}


_RECORDS = "torch.distributed.checkpoint.metadata"
_STORAGE = "torch.distributed.checkpoint.filesystem"
_PATHS = ("PosixPath", "Path")
# What an index names, by module, besides torch's data types.
_KNOWN: dict[str, tuple[str, ...]] = {
    _RECORDS: (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "BytesStorageMetadata",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    _STORAGE: ("_StorageInfo",),
    "torch": ("Size",),
    # Only a name here, as all of them; torch's pickles give the memory layout in this way.
    "torch.serialization": ("_get_layout",),
    "collections": ("OrderedDict",),
    # Left out of what is read: plans of all ranks, which torch's own writer keeps, and where the
    # checkpoint was written. pathlib._local is Python 3.13's.
    "torch.distributed.checkpoint.planner": (
        "SavePlan",
        "WriteItem",
        "WriteItemType",
        "TensorWriteData",
        "BytesIOWriteData",
    ),
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
}


def read_metadata(checkpoint: Path) -> Metadata:
    """Return the index of a checkpoint's tensors: only what torch needs to read them.

    UnsafePickleError if the file holds more, or places bytes outside of the folder; OSError if it
    cannot be read.
    """
    check_regular(checkpoint / TENSORS_FILE)
    with (checkpoint / TENSORS_FILE).open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    try:
        value = read_plain(content, _is_known)
    except UnsafePickleError as error:
        raise UnsafePickleError(f"{TENSORS_FILE} {error}") from error
    if not _is(value, "Metadata"):
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
    return name.name in _KNOWN.get(name.module, ())


def _is(value: Any, kind: str, module: str = _RECORDS) -> TypeGuard[Description]:
    return isinstance(value, Description) and value.kind == Name(module, kind)


def _damaged(what: str) -> NoReturn:
    raise UnsafePickleError(f"{TENSORS_FILE} is damaged ({what})")


def _fields(value: Any, kind: str, module: str = _RECORDS) -> Mapping[str, Any]:
    """The fields of a dataclass, as its instances are pickled."""
    if not _is(value, kind, module):
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
    if not _is(value, "Size", "torch") or len(value.args) != 1 or type(value.args[0]) is not tuple:
        _damaged("something else in place of a size")
    return torch.Size([_count(length) for length in value.args[0]])


def _entry(value: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if _is(value, "BytesStorageMetadata"):
        return BytesStorageMetadata()
    fields = _fields(value, "TensorStorageMetadata")
    size, chunks = _size(fields.get("size")), _exactly(list, fields.get("chunks"), "list")
    properties = TensorProperties(dtype=_dtype(fields.get("properties")))
    return TensorStorageMetadata(properties, size, [_chunk(chunk, size) for chunk in chunks])


def _dtype(properties: Any) -> torch.dtype:
    """The data type out of a tensor's properties; the others are torch's defaults in a file."""
    if (
        not _is(properties, "TensorProperties")
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
    fields = _fields(value, "_StorageInfo", _STORAGE)
    name = _text(fields.get("relative_path"))
    if name in ("", ".", "..") or Path(name).name != name or "\0" in name:
        raise UnsafePickleError(f"{TENSORS_FILE} places bytes outside of the folder: {name!r}")
    if fields.get("transform_descriptors"):
        raise UnsafePickleError(f"{TENSORS_FILE} wants bytes of {name} decoded by an extension")
    return _StorageInfo(name, _count(fields.get("offset")), _count(fields.get("length")))
