"""Megatron's own `PREFIX.bin` and `PREFIX.idx`, made elsewhere, without a manifest."""

import hashlib
from pathlib import Path

import numpy as np

from moepp_megatron.config.blends import Folder
from moepp_megatron.data.index import read_ends, read_header
from moepp_megatron.data.manifest import FORMAT_VERSION, Inputs, Manifest, SourceSummary
from moepp_megatron.data.tokenizer import Tokenizer

_END_BYTES = 64 * 1024
_LOOKED_AT = 1000


def is_pair(path: Path) -> bool:
    """True if a path is the prefix of such a pair."""
    return not path.is_dir() and Path(f"{path}.idx").is_file() and Path(f"{path}.bin").is_file()


def read_pair(prefix: Path) -> Manifest:
    """The manifest of a pair, as far as its files show; `Manifest.is_bare` is true for it.

    Its identity is a hash of the sizes and of both ends of the files, so that little is read.

    Raises:
        CorpusError: The index is none of tokens.
        OSError: A file cannot be read.
    """
    idx, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    header = read_header(idx)
    size = data.stat().st_size
    tokens = size // np.dtype(header.dtype).itemsize
    digest = hashlib.sha256()
    for path in (idx, data):
        with path.open("rb") as stream:
            length = stream.seek(0, 2)
            digest.update(f"{length}\0".encode())
            for start in (0, max(length - _END_BYTES, 0)):
                stream.seek(start)
                digest.update(stream.read(_END_BYTES))
    source = SourceSummary(prefix.name, 1, size, header.documents, 0, tokens)
    return Manifest(
        format_version=FORMAT_VERSION,
        sources=[source],
        documents=header.documents,
        skipped=0,
        skipped_reasons={},
        tokens=tokens,
        vocab_size=0,
        eod_id=-1,
        eod_token="",
        tokenizer_sha256="",
        files={path.name: path.stat().st_size for path in (data, idx)},
        inputs=Inputs({}, digest.hexdigest(), ""),
    )


def pair_warnings(folder: Folder, tokenizer: Tokenizer) -> list[str]:
    """Warnings: what cannot be checked of a pair, and whether its tokenizer looks wrong.

    Raises:
        CorpusError: The index is damaged.
        OSError: A file cannot be read.
    """
    warnings = [
        f"{folder} has no manifest: whether data.tokenizer has made its ids, whether all of them "
        "are in the vocabulary (batches are checked as they are read) and whether the "
        "bytes are as they were written cannot be checked"
    ]
    idx = Path(f"{folder.path}.idx")
    header = read_header(idx)
    data = np.memmap(f"{folder.path}.bin", dtype=header.dtype, mode="r")
    ends = read_ends(idx, header, data.nbytes, is_ours=False)
    looked_at = ends[np.linspace(0, len(ends) - 1, min(len(ends), _LOOKED_AT), dtype=np.int64)]
    last = data[looked_at[looked_at > 0] - 1]
    without = int((last != tokenizer.eod).sum())
    if without:
        warnings.append(
            f"{folder}: {without:,} of {len(last):,} documents looked at do not end with "
            f"token {tokenizer.eod} ({tokenizer.eod_token}), the end of a document: they were "
            "made without --append-eod, or data.tokenizer is another one"
        )
    return warnings
