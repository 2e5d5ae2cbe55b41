"""Reads a column of text from tables: parquet, and Arrow files as Hugging Face's datasets saves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.data.compressed import too_large, unpacked_limit
from moepp_megatron.runtime.install import how_to_install

TABLES = ("parquet", "arrow")
CONVERSATION_KEYS = ({"messages"}, {"conversations"}, {"instruction", "output"})
"""Keys or columns of conversations in the forms that `chat_records` reads."""
_ARROW_FILE = b"ARROW1"
# Read at once; few, since a value that is there once in the file may be that of each row.
_ROWS = 4


def count_groups(path: Path, kind: str, column: str | None) -> int:
    """How many groups of rows a table has: row groups of parquet, record batches of Arrow.

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
        return sum(1 for _ in table)


def _unpacked(group: Any, column: str | None) -> int:
    """Bytes of a column, or of all, in a row group of parquet, as the file states them."""
    chunks = [group.column(index) for index in range(group.num_columns)]
    wanted = [c for c in chunks if column in (None, c.path_in_schema.split(".")[0])]
    return sum(chunk.total_uncompressed_size for chunk in wanted)


def read_column(path: Path, kind: str, groups: range, column: str) -> Iterator[Any]:
    """The values of a column in some groups of rows; bytes where a text is not UTF-8.

    Raises:
        ConfigError: The table is damaged, or pyarrow is absent.
    """
    with _opened(path, kind) as table:
        for batch in _batches_of(table, kind, groups, [column]):
            # One by one: rows may share one long value.
            for value in batch.column(column):
                try:
                    yield value.as_py()
                except UnicodeDecodeError:
                    # Whoever wrote the file has not checked it.
                    yield value.as_buffer().to_pybytes()


def read_rows(path: Path, kind: str, groups: range) -> Iterator[dict[str, Any] | None]:
    """The rows of some groups; None for one with a text that is not UTF-8.

    Raises:
        ConfigError: The table is damaged, or pyarrow is absent.
    """
    with _opened(path, kind) as table:
        for batch in _batches_of(table, kind, groups, None):
            for row in batch.to_struct_array():
                try:
                    yield row.as_py()
                except UnicodeDecodeError:
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
                yield _batches(mapped, pyarrow)
        else:
            raise ValueError(f"the format {kind} of {path} is unknown")
    except (OSError, pyarrow.ArrowException) as error:
        name = "parquet" if kind == "parquet" else "Arrow"
        raise ConfigError(f"source {path} is no readable {name} file ({error})") from error


class _FileBatches:
    """The record batches of Arrow's file format, as a stream has them."""

    def __init__(self, reader: Any) -> None:
        self.schema = reader.schema
        self._reader = reader

    def __iter__(self) -> Iterator[Any]:
        return (self._reader.get_batch(i) for i in range(self._reader.num_record_batches))


def _batches(mapped: Any, pyarrow: Any) -> Any:
    is_file = mapped.read(len(_ARROW_FILE)) == _ARROW_FILE
    mapped.seek(0)
    return (
        _FileBatches(pyarrow.ipc.open_file(mapped)) if is_file else pyarrow.ipc.open_stream(mapped)
    )
