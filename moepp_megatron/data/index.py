"""Reads the index of a Megatron indexed dataset, without megatron-core, and checks it."""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# megatron/core/datasets/indexed_dataset.py: _IndexWriter and DType.
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_VERSION = 1
_DTYPES: dict[int, type[np.integer]] = {4: np.int32, 8: np.uint16}


class CorpusError(ValueError):
    """A corpus file is damaged; the message says which and how."""


@dataclass(frozen=True)
class _IndexHeader:
    """The first bytes of an index."""

    dtype: type[np.integer]
    documents: int


def read_header(path: Path, documents: int | None = None) -> _IndexHeader:
    """Read and check the header of `corpus.idx`, and its size: cheap for any number of documents.

    `documents` is how many there must be, each of one sequence. None takes an index of any, where
    each sequence counts as a document, as for megatron-core's GPT datasets. Raises CorpusError if
    it is no such index, OSError if it cannot be read.
    """
    with path.open("rb") as stream:
        data = stream.read(_HEADER.size)
        size = stream.seek(0, 2)
    if len(data) < _HEADER.size:
        raise CorpusError(f"{path.name} is cut short")
    magic, version, code, sequences, boundaries = _HEADER.unpack(data)
    if magic != _MAGIC or version != _VERSION or code not in _DTYPES:
        raise CorpusError(f"{path.name} is no index of tokens (32-bit or unsigned 16-bit)")
    if documents is not None and (sequences != documents or boundaries != documents + 1):
        raise CorpusError(
            f"{path.name} counts {sequences} documents where the manifest has {documents}"
        )
    # Lengths int32 [n], starts int64 [n], document boundaries int64 [n + 1].
    expected = _HEADER.size + 12 * sequences + 8 * boundaries
    if size != expected:
        raise CorpusError(f"{path.name} has {size} bytes where its counts need {expected}")
    return _IndexHeader(_DTYPES[code], sequences)


def read_ends(
    path: Path, header: _IndexHeader, bin_bytes: int, is_ours: bool = True
) -> NDArray[np.int64]:
    """Read and check all of an index: the documents follow each other and fill the corpus.

    Args:
        bin_bytes: size of `corpus.bin`.
        is_ours: every document is one sequence, and none is empty.

    Returns:
        [documents] int64: the token after the last one of each document.

    Raises:
        CorpusError: documents lie elsewhere.
        OSError: it cannot be read.
    """
    count, item = header.documents, np.dtype(header.dtype).itemsize
    with path.open("rb") as stream:
        stream.seek(_HEADER.size)
        lengths = np.fromfile(stream, np.int32, count)
        starts = np.fromfile(stream, np.int64, count)
        boundaries = np.fromfile(stream, np.int64, count + 1) if is_ours else None
    ends = np.cumsum(lengths, dtype=np.int64)
    wrong = (lengths < (1 if is_ours else 0)) | (starts != (ends - lengths) * item)
    if wrong.any():
        raise CorpusError(f"{path.name} is wrong about document {int(wrong.argmax())}")
    if boundaries is not None and not np.array_equal(boundaries, np.arange(count + 1)):
        raise CorpusError(f"{path.name} is wrong about which sequences are documents")
    tokens = int(ends[-1]) if count else 0
    if tokens * item != bin_bytes:
        raise CorpusError(
            f"{path.name} describes {tokens:,} tokens of {item} bytes where the corpus has "
            f"{bin_bytes:,} bytes"
        )
    return ends
