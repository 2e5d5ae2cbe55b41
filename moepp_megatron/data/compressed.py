"""Source files that may be compressed."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.runtime.install import how_to_install

Compression = Literal["gzip", "zstd"]

COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
_BUFFER_BYTES = 1024 * 1024


@contextmanager
def open_source(path: Path, compression: Compression | None) -> Iterator[BinaryIO]:
    """Open a source file to read its contents, decompressed.

    Args:
        path: the file.
        compression: how it is compressed; None if it is not.

    Raises:
        ConfigError: it cannot be read; it is compressed with Zstandard and pyarrow, which reads
            that, is absent; or the compressed data are damaged or end too early. Each of them may
            show only while reading.
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
            yield stream  # type: ignore[misc]  # reads like a BinaryIO
    elif compression == "zstd":
        try:
            import pyarrow
        except ImportError as error:
            raise ConfigError(
                f"source {path} is compressed with Zstandard, which needs pyarrow; "
                f"{how_to_install('pyarrow')}"
            ) from error
        with pyarrow.input_stream(str(path), compression="zstd") as compressed:
            yield io.BufferedReader(compressed, _BUFFER_BYTES)
    else:
        with path.open("rb") as stream:
            yield stream
