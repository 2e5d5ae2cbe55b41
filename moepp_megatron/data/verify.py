"""Checks a prepared folder against its manifest, quickly or byte by byte."""

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
from moepp_megatron.data.manifest import CORPUS, FILES, Manifest
from moepp_megatron.data.megatron_files import is_pair, read_pair
from moepp_megatron.file_names import DATA_MANIFEST_FILE

BIN, IDX = f"{CORPUS}.bin", f"{CORPUS}.idx"
# A multiple of the size of an id.
_CHUNK_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class FileState:
    """The result of checking one file; `compared`: with the hash of when it was written."""

    name: str
    size: int | None
    problem: str = ""
    compared: bool = False


def read_manifest(folder: Folder) -> Manifest:
    """The manifest of a prepared folder.

    Raises:
        ConfigError: There is none, or one that is damaged.
    """
    path = folder.path
    stem = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    if is_pair(stem) and (stem.parent / DATA_MANIFEST_FILE).is_file():
        # Its tokenizer, its hashes and the marks of conversations would go unread.
        raise ConfigError(
            f"{folder} must be the folder that moepp data prepare wrote; use {stem.parent}"
        )
    if path != stem and is_pair(stem):
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
    return read_pair(path) if is_pair(path) else Manifest.read(path)


def corpus_identity(path: Path) -> str | None:
    """Identifies the tokens of a prepared folder, wherever it is; None if it is not one."""
    try:
        return _manifest_at(path).identity
    except (OSError, ValueError):
        return None


def check_start(folder: Folder, manifest: Manifest, whole_index: bool = False) -> None:
    """Check what can be checked before training without reading the corpus.

    Args:
        folder: The prepared folder.
        manifest: Its manifest.
        whole_index: Read all of the index, 20 bytes per document, instead of its header.

    Raises:
        ConfigError: Files are missing or have another size, or the index is damaged.
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
    if is_pair(folder.path):
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

    Returns:
        One entry per file.
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


class _TokenCheck:
    """Finds the first token outside of the vocabulary in a corpus that is read chunk by chunk."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        # From the index, without which it is not known how many bytes an id has.
        self.dtype: np.dtype[np.integer] | None = None
        self.ends: NDArray[np.int64] | None = None
        self._tokens_before = 0
        self.problem = ""

    def check(self, chunk: bytes) -> None:
        if self.dtype is None or self.problem:
            return
        tokens = np.frombuffer(chunk, self.dtype, len(chunk) // self.dtype.itemsize)
        wrong = (tokens < 0) | (tokens >= self._vocab_size)
        if wrong.any():
            index = int(wrong.argmax())
            place = self._place(self._tokens_before + index)
            self.problem = outside(place, int(tokens[index]), self._vocab_size)
        self._tokens_before += len(tokens)

    def _place(self, position: int) -> str:
        if self.ends is None or position >= self.ends[-1]:
            return f"token {position}"
        document = int(np.searchsorted(self.ends, position, side="right"))
        start = int(self.ends[document - 1]) if document else 0
        return f"token {position - start} of document {document}"


def outside(place: str, token: int, vocab_size: int) -> str:
    """The message that a token is not in the vocabulary."""
    return f"{place} is {token}, outside of the vocabulary (0 to {vocab_size - 1})"
