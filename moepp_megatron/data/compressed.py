"""Source files that may be compressed."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
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

    Args:
        path: the file.
        compression: how it is compressed; None if it is not.

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
