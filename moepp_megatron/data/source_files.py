"""Source files: text, compressed or not; columns and rows of parquet and Arrow tables."""

import gzip
import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.runtime.optional import how_to_install

Compression = Literal["gzip", "zstd"]
Format = Literal["text", "jsonl", "parquet", "arrow"]

COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
_ZSTD_MAGIC, _ZSTD_HAS_CHECKSUM = b"\x28\xb5\x2f\xfd", 0b100
_BUFFER_BYTES = 1024 * 1024
# Of a file that unpacks to more, memory would be the measure. Text packs to a tenth, logs to less.
_SMALL_BYTES, _MOST_TIMES = 64 * 1024 * 1024, 100

TABLES = ("parquet", "arrow")
CONVERSATION_KEYS = ({"messages"}, {"conversations"}, {"instruction", "output"})
"""Keys or columns of conversations in the forms that `prepare_chat` reads."""
_ARROW_FILE, _STREAM_IN_FILE = b"ARROW1", 8
# Numbers of fields in Arrow's Message.fbs.
_HEADER, _BATCH_OF_DICTIONARY, _BUFFERS, _COMPRESSION = 2, 1, 2, 3
# Read at once; few, since a value that is there once in the file may be that of each row.
_ROWS = 4


def unpacked_limit(path: Path) -> int:
    """Bytes that a compressed file, or one that is compressed inside, may hold."""
    return max(_SMALL_BYTES, _MOST_TIMES * path.stat().st_size)


@dataclass(frozen=True)
class SourceFile:
    """One file to read: text or JSONL, compressed or not, or a table of parquet or Arrow.

    Attributes:
        name: its path within the source, with forward slashes; the part of it that fingerprints
            see, so that a corpus may move.
        size: bytes, as stored.
        compression: compression of the whole file, by the end of its name.
        group: name of its group; documents of one group are together in one part of the split.
            None if documents are independent.
    """

    path: Path
    name: str
    format: Format
    size: int
    mtime_ns: int
    compression: Compression | None = None
    group: str | None = None

    def too_large(self) -> ConfigError:
        """The error of a file that holds more."""
        return ConfigError(
            f"source {self.path} must hold at most {_MOST_TIMES} times its size and holds more; "
            "leave it out, or unpack it if you know what made it"
        )

    def lacks_checksum(self) -> bool:
        """True if damage in a compressed file may go unnoticed; gzip always has a checksum."""
        if self.compression != "zstd":
            return False
        with self.path.open("rb") as stream:
            # Frames that are skipped may come first (RFC 8878, 3.1).
            _, _, frame = stream.read(64).partition(_ZSTD_MAGIC)
        return frame != b"" and not frame[0] & _ZSTD_HAS_CHECKSUM

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open it to read its contents, decompressed; errors may show only while reading.

        Raises ConfigError if it cannot be read, if pyarrow, which reads Zstandard, is absent, or if
        the compressed data are damaged, end too early or unpack to more than `unpacked_limit`.
        """
        try:
            with self._open() as stream:
                yield stream
        except (EOFError, zlib.error, OSError) as error:
            # Errors of decompression that are an OSError have no number, unlike the system's.
            if isinstance(error, OSError) and error.errno is not None:
                raise ConfigError(
                    f"source {self.path} cannot be read ({error.strerror}); make it readable or "
                    "leave it out"
                ) from error
            raise ConfigError(
                f"source {self.path} cannot be decompressed ({error}); replace it or leave it out"
            ) from error

    @contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        if self.compression == "gzip":
            with gzip.open(self.path, "rb") as stream:
                yield io.BufferedReader(_Limited(stream, self), _BUFFER_BYTES)
        elif self.compression == "zstd":
            try:
                import pyarrow
            except ImportError as error:
                raise ConfigError(
                    f"source {self.path} is compressed with Zstandard, which needs pyarrow; "
                    f"{how_to_install('pyarrow')}"
                ) from error
            with pyarrow.input_stream(str(self.path), compression="zstd") as compressed:
                yield io.BufferedReader(_Limited(compressed, self), _BUFFER_BYTES)
        else:
            assert self.compression is None, (
                f"{self.path}: the compression {self.compression} is unknown"
            )
            with self.path.open("rb") as stream:
                yield stream

    def count_groups(self, column: str | None) -> int:
        """Count the row groups of a table: those of parquet, record batches of Arrow.

        Raises ConfigError without pyarrow, and if it is damaged, too large or lacks the column.
        """
        with self._table() as table:
            names = table.schema_arrow.names if self.format == "parquet" else table.schema.names
            if column is not None and column not in names:
                if any(keys <= set(names) for keys in CONVERSATION_KEYS):
                    raise ConfigError(
                        f"source {self.path} has no column {column}, and is of conversations; "
                        "prepare them with --chat, --tokenizer and --seq-length"
                    )
                raise ConfigError(
                    f"source {self.path} has no column {column}; set --text-key to one of: "
                    + ", ".join(names)
                )
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise ConfigError(
                    f"source {self.path} has several columns {twice}; rename all but one"
                )
            if self.format == "parquet":
                groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
                count, sizes = len(groups), [_unpacked(group, column) for group in groups]
            else:
                batches = [message for message in table.messages() if message.type != "schema"]
                count = sum(message.type == "record batch" for message in batches)
                sizes = list(map(_unpacked_batch, batches))
            if sum(sizes) > unpacked_limit(self.path):
                raise self.too_large()
            return count

    def rows(self, groups: range, column: str | None = None) -> Iterator[dict[str, Any] | None]:
        """Yield rows of a table's groups, or one column of them; None for text that is not UTF-8.

        Raises ConfigError if the table is damaged, or pyarrow is absent.
        """
        columns = None if column is None else [column]
        with self._table() as table:
            if self.format == "parquet":
                batches = table.iter_batches(_ROWS, row_groups=list(groups), columns=columns)
            else:
                # A stream has no index, but a batch that is passed over is mapped and not read.
                batches = islice(table, groups.start, groups.stop)
            for batch in batches:
                # One by one: rows may share one long value.
                for row in (batch.select(columns) if columns else batch).to_struct_array():
                    try:
                        yield row.as_py()
                    except UnicodeDecodeError:
                        # Whoever wrote the file has not checked it.
                        yield None

    @contextmanager
    def _table(self) -> Iterator[Any]:
        try:
            import pyarrow
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise ConfigError(
                f"source {self.path} is {self.format}, which needs pyarrow; "
                f"{how_to_install('pyarrow')}"
            ) from error
        try:
            if self.format == "parquet":
                with ParquetFile(self.path) as table:
                    yield table
            elif self.format == "arrow":
                with pyarrow.memory_map(str(self.path)) as mapped:
                    yield _Batches(mapped, pyarrow)
            else:
                raise ValueError(f"the format {self.format} of {self.path} is unknown")
        except (OSError, struct.error, pyarrow.ArrowException) as error:
            name = "parquet" if self.format == "parquet" else "Arrow"
            raise ConfigError(f"source {self.path} is no readable {name} file ({error})") from error


class _Limited(io.RawIOBase):
    """Reads an unpacking stream up to the file's limit."""

    def __init__(self, stream: Any, file: SourceFile) -> None:
        self._stream, self._file, self._left = stream, file, unpacked_limit(file.path)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self._stream.readinto(buffer)
        self._left -= count
        if self._left < 0:
            raise self._file.too_large()
        return count


def _unpacked(group: Any, column: str | None) -> int:
    """Bytes of a column, or of all, in a row group of parquet, as the file states them."""
    chunks = [group.column(index) for index in range(group.num_columns)]
    wanted = [c for c in chunks if column in (None, c.path_in_schema.split(".")[0])]
    return sum(chunk.total_uncompressed_size for chunk in wanted)


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
    """Bytes that the buffers of a batch of Arrow unpack to; 0 where they are mapped as they are."""
    # Arrow's Python interface unpacks a batch whole, without a limit. The format is that of Arrow's
    # Message.fbs and of flatbuffers: a table begins with the distance to its fields' offsets.
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
