"""Reads lines and fields of other programs' files, with errors that name the place."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast, overload

from moepp_megatron.config.json_file import parse_json
from moepp_megatron.workbench.profiling.trace import ProfileError

_GZIP = b"\x1f\x8b"


class SourceError(ProfileError):
    """A profile that cannot be read: names the file, the place in it, and what is missing."""


def read_bytes(path: Path, limit: int = -1) -> bytes:
    """The content of a file, unpacked if gzip; its first `limit` bytes if that is not negative.

    Raises:
        SourceError: The file cannot be read, or its compression is damaged.
    """
    with _opened(path) as file:
        return file.read(limit)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, unpacking gzip while reading; errors become a SourceError."""
    try:
        with path.open("rb") as file:
            packed = file.read(len(_GZIP)) == _GZIP
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            # typeshed's GzipFile is no IO[bytes].
            yield cast(IO[bytes], file)
    except EOFError as error:
        raise SourceError(f"{path}: cut short inside its gzip data; copy it again") from error
    except (OSError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise SourceError(f"{path}: {reason or error}") from error


def read_lines(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Number (from 1) and text of each line that is not empty, and whether it is the last."""
    before: tuple[int, str] | None = None
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            text = line.decode("utf-8", errors="replace").strip()
            if text:
                if before is not None:
                    yield *before, False
                before = number, text
    if before is not None:
        yield *before, True


def json_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place ("FILE, line N") and value of a file with one JSON object on each line.

    A last line that ends early is left out: a program that still runs, or that was killed, has
    not finished it.

    Raises:
        SourceError: If another line is not a JSON object.
    """
    for number, line, is_last in read_lines(path):
        place = f"{path}, line {number}"
        try:
            value = parse_json(line)
        except ValueError as error:
            if is_last:
                return
            raise SourceError(f"{place}: not JSON ({error})") from error
        if not isinstance(value, dict):
            raise SourceError(f"{place}: a JSON object is expected, not {type(value).__name__}")
        yield place, value


@overload
def field[Value](record: Any, name: str, kind: type[Value], place: str) -> Value: ...


@overload
def field[Value](
    record: Any, name: str, kind: type[Value], place: str, default: Value
) -> Value: ...


def field(record: Any, name: str, kind: type, place: str, default: Any = ...) -> Any:
    """A field of a record.

    Args:
        record: The record; a mapping unless the file is damaged.
        name: Name of the field; dots lead into records within it (`header.rank`).
        kind: int, float (takes whole numbers too), str, list or dict.
        place: Where the record is, for the error.
        default: What to return where the field is absent; without it an absent field is an error.

    Raises:
        SourceError: If the field is absent, or of another kind.
    """
    value = record
    for part in name.split("."):
        if not isinstance(value, dict) or value.get(part) is None:
            if default is not ...:
                return default
            raise SourceError(f"{place}: field {name!r} is missing")
        value = value[part]
    wanted: tuple[type, ...] = (int, float) if kind is float else (kind,)
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        found = type(value).__name__
        raise SourceError(f"{place}: field {name!r} is {found} {value!r}, not {kind.__name__}")
    return value
