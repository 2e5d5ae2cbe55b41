"""Checks a prepared folder against its manifest, and what can be checked of a pair without one."""

import hashlib
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moepp_megatron.config.blends import Folder
from moepp_megatron.config.errors import ConfigError
from moepp_megatron.config.paths import looked_at
from moepp_megatron.data.index import CorpusError, read_ends, read_header
from moepp_megatron.data.manifest import (
    CORPUS,
    FILES,
    FORMAT_VERSION,
    Inputs,
    Manifest,
    SourceSummary,
)
from moepp_megatron.data.tokenizer import Tokenizer
from moepp_megatron.file_names import DATA_MANIFEST_FILE

BIN, IDX = f"{CORPUS}.bin", f"{CORPUS}.idx"
# A multiple of the size of an id.
_CHUNK_BYTES = 16 * 1024 * 1024
# Of a pair of Megatron's own, without a manifest: bytes at both ends of a file that identify it,
# and documents whose last token is looked at.
_END_BYTES, _LOOKED_AT = 64 * 1024, 1000


@dataclass(frozen=True)
class FileState:
    """The result of checking one file; `compared`: with the hash of when it was written."""

    name: str
    size: int | None
    problem: str = ""
    compared: bool = False


def read_manifest(folder: Folder) -> Manifest:
    """Return a folder's manifest; raise ConfigError if there is none, or if it is damaged."""
    path = folder.path
    stem = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    if _is_pair(stem) and (stem.parent / DATA_MANIFEST_FILE).is_file():
        # Its tokenizer, its hashes and the marks of conversations would go unread.
        raise ConfigError(
            f"{folder} must be the folder that moepp data prepare wrote; use {stem.parent}"
        )
    if path != stem and _is_pair(stem):
        raise ConfigError(f"{folder} must be the prefix of both files; use {stem}")
    try:
        return _manifest_at(path)
    except CorpusError as error:
        raise damaged(folder, str(error)) from None
    except (OSError, ValueError) as error:
        reason = "" if isinstance(error, FileNotFoundError) else f" ({error})"
        raise ConfigError(
            f"{folder} must be a prepared folder{reason}{looked_at(path)}; run: "
            f"moepp data prepare SOURCE... --out {shlex.quote(str(path))}"
        ) from None


def _manifest_at(path: Path) -> Manifest:
    return _read_pair(path) if _is_pair(path) else Manifest.read(path)


def corpus_identity(path: Path) -> str | None:
    """Identifies the tokens of a prepared folder, wherever it is; None if it is not one."""
    try:
        return _manifest_at(path).identity
    except (OSError, ValueError):
        return None


def check_start(folder: Folder, manifest: Manifest, whole_index: bool = False) -> None:
    """Check what can be checked before training without reading the corpus.

    `whole_index` reads all of the index, 20 bytes per document, instead of its header. Raises
    ConfigError if files are missing or have another size, or the index is damaged.
    """
    if manifest.is_bare:
        # Its counts are from the index; the whole of that is read by `pair_warnings`.
        return
    try:
        for file in manifest.files:
            _check_size(folder.path, manifest, file)
        header = read_header(folder.path / IDX, manifest.documents)
        if whole_index:
            read_ends(folder.path / IDX, header, manifest.files[BIN])
    except CorpusError as error:
        raise damaged(folder, str(error)) from None
    except OSError as error:
        raise damaged(folder, f"{error.filename}: {error.strerror}") from None


def damaged(folder: Folder, problem: str) -> ConfigError:
    """The error for a damaged folder or pair, with a remedy."""
    if _is_pair(folder.path):
        return ConfigError(
            f"{folder} is damaged, or not of data.tokenizer: {problem}; put back a copy, or name "
            "the tokenizer that it was made with"
        )
    return ConfigError(
        f"{folder} is damaged: {problem}; put back a copy or prepare it again with --force, and "
        f"check it with: moepp data verify {shlex.quote(str(folder.path))}"
    )


def verify(folder: Path, manifest: Manifest, advance: Callable[[int], None]) -> list[FileState]:
    """Check every byte: sizes, hashes, index, and that every token is in the vocabulary.

    Returns one entry per file.
    """
    states = []
    tokens = _TokenCheck(manifest.vocab_size)
    # The index first: it names the document of a token.
    for name in sorted(manifest.files, key=FILES.index):
        path, problems, compared = folder / name, list[str](), False
        try:
            _check_size(folder, manifest, name)
            if name == IDX:
                header = read_header(path, manifest.documents)
                tokens.dtype = np.dtype(header.dtype)
                tokens.ends = read_ends(path, header, manifest.files[BIN])
        except (CorpusError, OSError) as error:
            problems.append(_words(error))
        size = path.stat().st_size if path.is_file() else None
        if size is not None:
            try:
                digest = _read(path, advance, tokens if name == BIN else None)
                expected = manifest.sha256_of(name)
                compared = expected is not None
                if compared and digest != expected:
                    problems.append(f"{name} holds other bytes than were written")
                if name == BIN and tokens.problem:
                    problems.append(tokens.problem)
            except OSError as error:
                problems.append(_words(error))
        states.append(FileState(name, size, ", ".join(problems), compared))
    return states


def _check_size(folder: Path, manifest: Manifest, name: str) -> None:
    path, expected = folder / name, manifest.files[name]
    if not path.is_file():
        raise CorpusError(f"{name} is missing")
    size = path.stat().st_size
    if size != expected:
        raise CorpusError(f"{name} has {size:,} bytes where {expected:,} were written")


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _read(path: Path, advance: Callable[[int], None], check: "_TokenCheck | None") -> str:
    """SHA-256 of a file; its tokens are checked in the same pass."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            if check is not None:
                check.check(chunk)
            advance(len(chunk))
    return digest.hexdigest()


@dataclass
class _TokenCheck:
    """Finds the first token outside of the vocabulary in a corpus that is read chunk by chunk."""

    vocab_size: int
    # From the index, without which it is not known how many bytes an id has.
    dtype: np.dtype[np.integer] | None = None
    ends: NDArray[np.int64] | None = None
    tokens_before: int = 0
    problem: str = ""

    def check(self, chunk: bytes) -> None:
        if self.dtype is None or self.problem:
            return
        tokens = np.frombuffer(chunk, self.dtype, len(chunk) // self.dtype.itemsize)
        wrong = (tokens < 0) | (tokens >= self.vocab_size)
        if wrong.any():
            index = int(wrong.argmax())
            place = self.tokens_before + index
            document = ""
            if self.ends is not None and place < self.ends[-1]:
                number = int(np.searchsorted(self.ends, place, side="right"))
                place -= int(self.ends[number - 1]) if number else 0
                document = f" of document {number}"
            token = int(tokens[index])
            self.problem = outside(f"token {place}{document}", token, self.vocab_size)
        self.tokens_before += len(tokens)


def outside(place: str, token: int, vocab_size: int) -> str:
    """The message that a token is not in the vocabulary."""
    return f"{place} is {token}, outside of the vocabulary (0 to {vocab_size - 1})"


def _is_pair(path: Path) -> bool:
    """True if a path is the prefix of such a pair."""
    return not path.is_dir() and Path(f"{path}.idx").is_file() and Path(f"{path}.bin").is_file()


def _read_pair(prefix: Path) -> Manifest:
    """The manifest of a pair, as far as its files show; `Manifest.is_bare` is true for it."""
    idx, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    header = read_header(idx)
    size = data.stat().st_size
    tokens = size // np.dtype(header.dtype).itemsize
    # Of the sizes and of both ends of the files, so that little is read.
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
    """Return warnings: what cannot be checked of a pair, and whether its tokenizer looks wrong.

    Raises CorpusError if the index is damaged, OSError if a file cannot be read.
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
