"""Records in files that other programs write: lines, fields, and what is wrong with them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, overload

_GZIP = b"\x1f\x8b"


class SourceError(ValueError):
    """A profile that cannot be read: names the file, the place in it, and what is missing."""

    exit_code = 2


def read_bytes(path: Path, limit: int = -1) -> bytes:
    """The content of a file, unpacked if gzip; its first `limit` bytes if that is not negative.

    Raises:
        SourceError: The file cannot be read, or its compression is damaged.
    """
    try:
        with path.open("rb") as file:
            packed = file.read(len(_GZIP)) == _GZIP
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            return file.read(limit)
    except EOFError as error:
        raise SourceError(f"{path}: cut short inside its gzip data; copy it again") from error
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror or error}") from error


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of each line that is not empty."""
    text = read_bytes(path).decode("utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield number, line.strip()


def json_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place ("FILE, line N") and value of a file with one JSON object on each line.

    A last line that ends early is left out: a program that still runs, or that was killed, has
    not finished it.

    Raises:
        SourceError: Another line is no JSON object.
    """
    lines = list(read_lines(path))
    for position, (number, line) in enumerate(lines, start=1):
        place = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except ValueError as error:
            if position == len(lines):
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
        SourceError: The field is absent, or of another kind.
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
