"""The checked reader of all formats: bounded in size, every fault one line that names the place."""

import gzip
import reprlib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from pydantic import BaseModel, ValidationError

from moepp_megatron.config.errors import first_misfit
from moepp_megatron.config.json_file import parse_json
from moepp_megatron.config.regular_file import check_regular
from moepp_megatron.tools.profiling.trace import ProfileError

_GZIP = b"\x1f\x8b"
# Unpacked; as Python's objects a trace takes some six times as much.
MAX_BYTES = 1 << 30
# Beyond these a number is damage; sums and products of such numbers are still finite.
LARGEST = 1 << 63
MOST_RANKS = 1 << 20


def read_document(path: Path, remedy: str = "record it again") -> Any:
    """The content of a JSON file, which may be gzip; `remedy` ends the error.

    ProfileError if it cannot be read, its compression is damaged, it is too large or not JSON.
    """
    with _opened(path) as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ProfileError(
            f"{path}: more than {MAX_BYTES >> 20} MiB (unpacked); record fewer steps or calls"
        )
    try:
        return parse_json(content)
    except ValueError as error:
        raise ProfileError(f"{path}: not a whole JSON file ({error}); {remedy}") from None


def read_model[Model: BaseModel](
    path: Path, model: type[Model], content: Any, remedy: str
) -> Model:
    """A document as a pydantic model; a misfit is a ProfileError with the field and `remedy`."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        key, reason = first_misfit(error)
        field = repr(key or "the whole")
        raise ProfileError(f"{path}: field {field}: {reason.lower()}; {remedy}") from None


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, unpacking gzip while reading; errors become a ProfileError."""
    try:
        check_regular(path)
        with path.open("rb") as file:
            packed = file.read(len(_GZIP)) == _GZIP
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            # typeshed's GzipFile is no IO[bytes].
            yield cast(IO[bytes], file)
    except EOFError:
        raise ProfileError(f"{path}: cut short inside its gzip data; copy it again") from None
    except (OSError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise ProfileError(
            f"{path}: cannot be read ({reason or error}); give a whole file of a profile"
        ) from None


def field[Value](
    record: Any,
    name: str,
    kind: type[Value],
    place: str,
    default: Value | None = None,
    least: float = -LARGEST,
) -> Value:
    """A field of a record, or `default` where it is absent; without a default that is an error.

    `kind` is int, float (takes whole numbers too), str, list or dict, `least` the least number that
    is sound. A ProfileError, which names `place`, says that the field is absent, of another kind,
    or no sound number.
    """
    value = record.get(name) if isinstance(record, dict) else None
    if value is None:
        if default is not None:
            return default
        raise ProfileError(f"{place}: field {name!r} is missing; record it again")
    if not _fits(value, kind, least):
        bound = f" of at least {least:g}" if kind in (int, float) and least > -LARGEST else ""
        raise ProfileError(
            f"{place}: field {name!r} is {type(value).__name__} {reprlib.repr(value)}, not "
            f"{kind.__name__}{bound}; record it again"
        )
    return cast(Value, value)


def optional[Value](record: Any, name: str, kind: type[Value], least: float = 0) -> Value | None:
    """A field of a record that only says more about it; None where it is absent or damaged."""
    value = record.get(name)
    return cast(Value, value) if _fits(value, kind, least) else None


def _fits(value: Any, kind: type, least: float) -> bool:
    wanted: tuple[type, ...] = (int, float) if kind is float else (kind,)
    if not isinstance(value, wanted) or isinstance(value, bool):
        return False
    number: Any = value
    # Not a number compares as false.
    return kind not in (int, float) or least <= number <= LARGEST


def whole_list(text: Any) -> list[int] | None:
    """Sizes or ranks of a list or "[1, 2]"; None for anything else, and for "[1, 2, ...]"."""
    if isinstance(text, str):
        try:
            text = parse_json(text)
        except ValueError:
            return None
    if not isinstance(text, list) or len(text) > MOST_RANKS:
        return None
    return text if all(_fits(item, int, 0) for item in text) else None
