"""Opens source files: text, compressed or not; columns and rows of parquet and Arrow tables."""

import gzip
import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.runtime.optional import how_to_install

Compression = Literal["gzip", "zstd"]

COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
_ZSTD_MAGIC, _ZSTD_HAS_CHECKSUM = b"\x28\xb5\x2f\xfd", 0b100
_BUFFER_BYTES = 1024 * 1024
# Of a file that unpacks to more, memory would be the measure. Text packs to a tenth, logs to less.
_SMALL_BYTES, _MOST_TIMES = 64 * 1024 * 1024, 100


def unpacked_limit(path: Path) -> int:
    """Bytes that a compressed file, or one that is compressed inside, may hold."""
    return max(_SMALL_BYTES, _MOST_TIMES * path.stat().st_size)


def too_large(path: Path) -> ConfigError:
    """The error of a file that holds more."""
    return ConfigError(
        f"source {path} must hold at most {_MOST_TIMES} times its size and holds more; leave it "
        "out, or unpack it if you know what made it"
    )


def lacks_checksum(path: Path, compression: Compression | None) -> bool:
    """True if damage in a compressed file may go unnoticed; gzip always has a checksum."""
    if compression != "zstd":
        return False
    with path.open("rb") as stream:
        # Frames that are skipped may come first (RFC 8878, 3.1).
        _, _, frame = stream.read(64).partition(_ZSTD_MAGIC)
    return frame != b"" and not frame[0] & _ZSTD_HAS_CHECKSUM


@contextmanager
def open_source(path: Path, compression: Compression | None) -> Iterator[BinaryIO]:
    """Open a source file to read its contents, decompressed.

    Raises:
        ConfigError: it cannot be read; it is compressed with Zstandard and pyarrow, which reads
            that, is absent; or the compressed data are damaged, end too early or unpack to more
            than `unpacked_limit`. Each of them may show only while reading.
    """
    try:
        with _open(path, compression) as stream:
            yield stream
    except (EOFError, zlib.error, OSError) as error:
        # Errors of decompression that are an OSError have no number, unlike those of the system.
        if isinstance(error, OSError) and error.errno is not None:
            raise ConfigError(
                f"source {path} cannot be read ({error.strerror}); make it readable or leave it out"
            ) from error
        raise ConfigError(
            f"source {path} cannot be decompressed ({error}); replace it or leave it out"
        ) from error


@contextmanager
def _open(path: Path, compression: Compression | None) -> Iterator[BinaryIO]:
    if compression == "gzip":
        with gzip.open(path, "rb") as stream:
            yield io.BufferedReader(_Limited(stream, path), _BUFFER_BYTES)
    elif compression == "zstd":
        try:
            import pyarrow
        except ImportError as error:
            raise ConfigError(
                f"source {path} is compressed with Zstandard, which needs pyarrow; "
                f"{how_to_install('pyarrow')}"
            ) from error
        with pyarrow.input_stream(str(path), compression="zstd") as compressed:
            yield io.BufferedReader(_Limited(compressed, path), _BUFFER_BYTES)
    else:
        assert compression is None, f"{path}: the compression {compression} is unknown"
        with path.open("rb") as stream:
            yield stream


class _Limited(io.RawIOBase):
    """Reads an unpacking stream up to the file's limit."""

    def __init__(self, stream: Any, path: Path) -> None:
        self._stream, self._path, self._left = stream, path, unpacked_limit(path)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self._stream.readinto(buffer)
        self._left -= count
        if self._left < 0:
            raise too_large(self._path)
        return count


TABLES = ("parquet", "arrow")
CONVERSATION_KEYS = ({"messages"}, {"conversations"}, {"instruction", "output"})
"""Keys or columns of conversations in the forms that `prepare_chat` reads."""
_ARROW_FILE, _STREAM_IN_FILE = b"ARROW1", 8
# Numbers of fields in Arrow's Message.fbs.
_HEADER, _BATCH_OF_DICTIONARY, _BUFFERS, _COMPRESSION = 2, 1, 2, 3
# Read at once; few, since a value that is there once in the file may be that of each row.
_ROWS = 4


def count_groups(path: Path, kind: str, column: str | None) -> int:
    """Count a table's row groups: those of parquet, record batches of Arrow.

    Raises:
        ConfigError: It is damaged, lacks the column or unpacks to too much, or pyarrow is absent.
    """
    with _opened(path, kind) as table:
        names = table.schema_arrow.names if kind == "parquet" else table.schema.names
        if column is not None and column not in names:
            if any(keys <= set(names) for keys in CONVERSATION_KEYS):
                raise ConfigError(
                    f"source {path} has no column {column}, and is of conversations; prepare them "
                    "with --chat, --tokenizer and --seq-length"
                )
            raise ConfigError(
                f"source {path} has no column {column}; set --text-key to one of: "
                + ", ".join(names)
            )
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"source {path} has several columns {twice}; rename all but one")
        if kind == "parquet":
            groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
            if sum(_unpacked(group, column) for group in groups) > unpacked_limit(path):
                raise too_large(path)
            return len(groups)
        batches = [message for message in table.messages() if message.type != "schema"]
        if sum(map(_unpacked_batch, batches)) > unpacked_limit(path):
            raise too_large(path)
        return sum(message.type == "record batch" for message in batches)


def _unpacked(group: Any, column: str | None) -> int:
    """Bytes of a column, or of all, in a row group of parquet, as the file states them."""
    chunks = [group.column(index) for index in range(group.num_columns)]
    wanted = [c for c in chunks if column in (None, c.path_in_schema.split(".")[0])]
    return sum(chunk.total_uncompressed_size for chunk in wanted)


def read_rows(
    path: Path, kind: str, groups: range, column: str | None = None
) -> Iterator[dict[str, Any] | None]:
    """Yield the rows of some groups, or one column of them; None for text that is not UTF-8.

    Raises:
        ConfigError: The table is damaged, or pyarrow is absent.
    """
    columns = None if column is None else [column]
    with _opened(path, kind) as table:
        for batch in _batches_of(table, kind, groups, columns):
            # One by one: rows may share one long value.
            for row in (batch.select(columns) if columns else batch).to_struct_array():
                try:
                    yield row.as_py()
                except UnicodeDecodeError:
                    # Whoever wrote the file has not checked it.
                    yield None


def _batches_of(table: Any, kind: str, groups: range, columns: list[str] | None) -> Iterator[Any]:
    if kind == "parquet":
        return iter(table.iter_batches(_ROWS, row_groups=list(groups), columns=columns))
    # A stream has no index, but a batch that is passed over is mapped and not read.
    return islice(table, groups.start, groups.stop)


@contextmanager
def _opened(path: Path, kind: str) -> Iterator[Any]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ConfigError(
            f"source {path} is {kind}, which needs pyarrow; {how_to_install('pyarrow')}"
        ) from error
    try:
        if kind == "parquet":
            with ParquetFile(path) as table:
                yield table
        elif kind == "arrow":
            with pyarrow.memory_map(str(path)) as mapped:
                yield _Batches(mapped, pyarrow)
        else:
            raise ValueError(f"the format {kind} of {path} is unknown")
    except (OSError, struct.error, pyarrow.ArrowException) as error:
        name = "parquet" if kind == "parquet" else "Arrow"
        raise ConfigError(f"source {path} is no readable {name} file ({error})") from error


class _Batches:
    """The record batches of Arrow's stream format, or of the stream inside its file format."""

    def __init__(self, mapped: Any, pyarrow: Any) -> None:
        is_file = mapped.read(len(_ARROW_FILE)) == _ARROW_FILE
        if is_file:
            mapped.seek(mapped.size() - len(_ARROW_FILE))
            if mapped.read() != _ARROW_FILE:
                raise pyarrow.ArrowInvalid("its end is missing")
        mapped.seek(_STREAM_IN_FILE if is_file else 0)
        self._mapped, self._start = mapped, mapped.tell()
        self._reader = pyarrow.ipc.open_stream(mapped)
        self.schema = self._reader.schema

    def __iter__(self) -> Iterator[Any]:
        return iter(self._reader)

    def messages(self) -> Any:
        """Return their stream from the beginning."""
        from pyarrow.ipc import MessageReader

        self._mapped.seek(self._start)
        return MessageReader.open_stream(self._mapped)


def _unpacked_batch(message: Any) -> int:
    """Bytes that the buffers of a batch of Arrow unpack to; 0 where they are mapped as they are.

    Arrow's Python interface unpacks a batch whole, without a limit. The format is that of Arrow's
    Message.fbs and of flatbuffers: a table begins with the distance to the offsets of its fields.
    """
    metadata, body = memoryview(message.metadata), memoryview(message.body)
    batch = _follow(metadata, _field(metadata, _follow(metadata, 0), _HEADER))
    if message.type == "dictionary":
        batch = _follow(metadata, _field(metadata, batch, _BATCH_OF_DICTIONARY))
    buffers = _field(metadata, batch, _BUFFERS)
    if not buffers or not _field(metadata, batch, _COMPRESSION):
        return 0
    start = _follow(metadata, buffers)
    (count,) = struct.unpack_from("<I", metadata, start)
    spans = struct.iter_unpack("<qq", metadata[start + 4 : start + 4 + 16 * count])
    # A buffer begins with its length when unpacked, or -1 if it is not packed.
    sizes = (struct.unpack_from("<q", body, begin)[0] for begin, length in spans if length)
    return sum(max(0, size) for size in sizes)


def _follow(data: memoryview, place: int) -> int:
    return place + int(struct.unpack_from("<I", data, place)[0])


def _field(data: memoryview, table: int, number: int) -> int:
    """The place of a field; 0 where the table has none."""
    fields = table - int(struct.unpack_from("<i", data, table)[0])
    (size,) = struct.unpack_from("<H", data, fields)
    at = 4 + 2 * number
    offset = struct.unpack_from("<H", data, fields + at)[0] if at < size else 0
    return table + int(offset) if offset else 0
