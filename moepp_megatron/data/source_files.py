"""What a source of text is: its files, in the order they are read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moepp_megatron.data.compressed import Compression

Format = Literal["text", "jsonl", "parquet", "arrow"]


@dataclass(frozen=True)
class SourceFile:
    """One file to read.

    Attributes:
        path: where it is.
        name: its path within the source, with forward slashes; the part of it that fingerprints
            see, so that a corpus may move.
        format: how to read documents from it.
        size: bytes, as stored.
        mtime_ns: modification time, nanoseconds.
        compression: compression of the whole file, by the end of its name.
        group: name of its group; documents of one group are together in one part of the split.
            None if each document is by itself.
    """

    path: Path
    name: str
    format: Format
    size: int
    mtime_ns: int
    compression: Compression | None = None
    group: str | None = None


@dataclass(frozen=True)
class TextSource:
    """One SOURCE argument and its files, in the order they are read."""

    name: str
    files: tuple[SourceFile, ...]

    @property
    def size(self) -> int:
        """Bytes in all files."""
        return sum(file.size for file in self.files)
