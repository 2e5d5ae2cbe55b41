"""Reads a column of text from tables: parquet, and Arrow files as Hugging Face's datasets saves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.runtime.install import how_to_install

TABLES = ("parquet", "arrow")
_ARROW_FILE = b"ARROW1"


def count_groups(path: Path, kind: str, column: str) -> int:
    """How many groups of rows a table has: row groups of parquet, record batches of Arrow.

    Raises:
        ConfigError: It is damaged or lacks the column, or pyarrow is absent.
    """
    with _opened(path, kind) as table:
        names = table.schema_arrow.names if kind == "parquet" else table.schema.names
        if column not in names:
            raise ConfigError(
                f"source {path} has no column {column}; set --text-key to one of: "
                + ", ".join(names)
            )
        if kind == "parquet":
            return int(table.num_row_groups)
        return sum(1 for _ in table)


def read_column(path: Path, kind: str, groups: range, column: str) -> Iterator[Any]:
    """The values of a column in some groups of rows; bytes where a text is not UTF-8.

    Raises:
        ConfigError: The table is damaged, or pyarrow is absent.
    """
    with _opened(path, kind) as table:
        if kind == "parquet":
            batches = table.iter_batches(256, row_groups=list(groups), columns=[column])
            columns = (batch.column(0) for batch in batches)
        else:
            # A stream has no index, but a batch that is passed over is mapped and not read.
            batches = islice(table, groups.start, groups.stop)
            columns = (batch.column(column) for batch in batches)
        for values in columns:
            try:
                yield from values.to_pylist()
            except UnicodeDecodeError:
                # Whoever wrote the file has not checked it.
                yield from map(_text_or_bytes, values.cast("binary").to_pylist())


def _text_or_bytes(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return value


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
        else:
            with pyarrow.memory_map(str(path)) as mapped:
                yield _batches(mapped, pyarrow)
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
