"""Reads untrusted JSON: size and memory are limited, and any fault is a ValueError."""

import json
from pathlib import Path
from typing import Any

from moepp_megatron.config.regular_file import check_regular

# Deeper than any file that is read here, far from what exhausts the stack of whoever walks it.
MAX_DEPTH = 64
# The safetensors library's limit of a header, the largest JSON of a checkpoint.
_MAX_BYTES = 100_000_000
# A value takes about 100 bytes of memory, and two characters of a file: `[],[],[],`.
MAX_VALUES = 2_000_000
_MAX_TRACE_VALUES = 50_000_000
_MAX_NUMBER = 1 << 64


def read_json(path: Path, max_bytes: int = _MAX_BYTES) -> Any:
    """Read a JSON file in UTF-8.

    OSError if it cannot be read or is no regular file; ValueError as for `parse_json`, or if it has
    more than `max_bytes`.
    """
    check_regular(path)
    with path.open("rb") as file:
        content: bytes = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"it has more than {max_bytes} bytes")
    return parse_json(content, MAX_VALUES)


def parse_json(content: str | bytes, max_values: int = _MAX_TRACE_VALUES) -> Any:
    """Parse JSON within limits, so that the result can be walked, compared, printed and written.

    Bytes are UTF-8. `max_values` limits values and keys; it counts commas, colons and brackets,
    also those in texts. ValueError if the content is no JSON, is nested more than `MAX_DEPTH`
    levels deep, or holds more values, half of a surrogate pair or a whole number of more than 64
    bits.
    """
    text = content if isinstance(content, str) else content.decode("utf-8-sig")
    if sum(map(text.count, ",:[{")) > max_values:
        raise ValueError(f"it has more than {max_values} values")
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep") from None
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
        level = _below(level)
    return value


def _below(level: list[Any]) -> list[Any]:
    """The contents of a level's containers, whose numbers and texts are checked."""
    below: list[Any] = []
    for item in level:
        kind = type(item)
        if kind is list:
            below += item
        elif kind is dict:
            below += item
            below += item.values()
        elif kind is str:
            if not item.isascii():
                _check_text(item)
        elif kind is int and abs(item) >= _MAX_NUMBER:
            raise ValueError("it has a whole number of more than 64 bits")
    return below


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it has half of a surrogate pair, which no text contains") from None
