"""Checks a prepared folder against its manifest, quickly or byte by byte."""

import hashlib
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.config.paths import looked_at
from moepp_megatron.data.index import CorpusError, IndexHeader, read_ends, read_header
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


def read_manifest(folder: Path, name: str) -> Manifest:
    """The manifest of a prepared folder.

    Raises:
        ConfigError: there is none, or one that is damaged.
    """
    stem = folder.with_suffix("") if folder.suffix in (".bin", ".idx") else folder
    if is_pair(stem) and (stem.parent / DATA_MANIFEST_FILE).is_file():
        # Its tokenizer, its hashes and the marks of conversations would go unread.
        raise ConfigError(
            f"{name} ({folder}) must be the folder that moepp data prepare wrote; use {stem.parent}"
        )
    if folder != stem and is_pair(stem):
        raise ConfigError(f"{name} ({folder}) must be the prefix of both files; use {stem}")
    try:
        return read_pair(folder) if is_pair(folder) else Manifest.read(folder)
    except CorpusError as error:
        raise damaged(name, folder, str(error)) from None
    except (OSError, ValueError) as error:
        reason = "" if isinstance(error, FileNotFoundError) else f" ({error})"
        raise ConfigError(
            f"{name} ({folder}) must be a prepared folder{reason}{looked_at(folder)}; run: "
            f"moepp data prepare SOURCE... --out {shlex.quote(str(folder))}"
        ) from None


def corpus_identity(folder: Path) -> str | None:
    """Identifies the tokens of a prepared folder, wherever it is; None if it is not one."""
    try:
        return (read_pair(folder) if is_pair(folder) else Manifest.read(folder)).identity
    except (OSError, ValueError):
        return None


def check_start(
    folder: Path, manifest: Manifest, whole_index: bool, name: str = "data.path"
) -> None:
    """Check what can be checked before training without reading the corpus.

    Args:
        folder: the prepared folder.
        manifest: its manifest.
        whole_index: read all of the index, 20 bytes per document, instead of its header.
        name: the setting that names the folder.

    Raises:
        ConfigError: files are missing or have another size, or the index is damaged.
    """
    try:
        if manifest.is_bare:
            # Its counts are from the index; the whole of that is read by `pairs.pair_warnings`.
            return
        for file in manifest.files:
            _check_size(folder, manifest, file)
        header = read_header(folder / IDX, manifest.documents)
        if whole_index:
            read_ends(folder / IDX, header, manifest.files[BIN])
    except CorpusError as error:
        raise damaged(name, folder, str(error)) from None
    except OSError as error:
        raise damaged(name, folder, f"{error.filename}: {error.strerror}") from None


def damaged(name: str, folder: Path, problem: str) -> ConfigError:
    """The error for a damaged folder or pair, with a remedy."""
    if is_pair(folder):
        return ConfigError(
            f"{name} ({folder}) is damaged, or not of data.tokenizer: {problem}; put back a copy, "
            "or name the tokenizer that it was made with"
        )
    return ConfigError(
        f"{name} ({folder}) is damaged: {problem}; put back a copy or prepare it again with "
        f"--force, and check it with: moepp data verify {shlex.quote(str(folder))}"
    )


def verify(folder: Path, manifest: Manifest, advance: Callable[[int], None]) -> list[FileState]:
    """Check every byte: sizes, hashes, index, and that every token is in the vocabulary.

    Returns:
        One entry per file.
    """
    states = []
    ends: NDArray[np.int64] | None = None
    header: IndexHeader | None = None
    # The index first: it names the document of a token.
    for name in sorted(manifest.files, key=FILES.index):
        path = folder / name
        size = None
        problems: list[str] = []
        compared = False
        try:
            _check_size(folder, manifest, name)
            size = manifest.files[name]
            if name == IDX:
                header = read_header(path, manifest.documents)
                ends = read_ends(path, header, manifest.files[BIN])
        except (CorpusError, OSError) as error:
            problems.append(_words(error))
            size = path.stat().st_size if path.is_file() else None
        if size is not None:
            try:
                check = _TokenCheck(manifest.vocab_size, header, ends) if name == BIN else None
                digest = _read(path, advance, check)
                compared = _compare(manifest, name, digest, problems)
                problems += [check.problem] if check and check.problem else []
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
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _compare(manifest: Manifest, name: str, digest: str, problems: list[str]) -> bool:
    expected = manifest.sha256_of(name)
    if expected is not None and digest != expected:
        problems.append(f"{name} holds other bytes than were written")
    return expected is not None


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

    def __init__(
        self, vocab_size: int, header: IndexHeader | None, ends: NDArray[np.int64] | None
    ) -> None:
        self._vocab_size = vocab_size
        # Without an index it is not known how many bytes an id has.
        self._dtype = None if header is None else np.dtype(header.dtype)
        self._ends = ends
        self._tokens_before = 0
        self.problem = ""

    def check(self, chunk: bytes) -> None:
        if self._dtype is None or self.problem:
            return
        tokens = np.frombuffer(chunk, self._dtype, len(chunk) // self._dtype.itemsize)
        wrong = (tokens < 0) | (tokens >= self._vocab_size)
        if wrong.any():
            index = int(wrong.argmax())
            place = self._place(self._tokens_before + index)
            self.problem = outside(place, int(tokens[index]), self._vocab_size)
        self._tokens_before += len(tokens)

    def _place(self, position: int) -> str:
        if self._ends is None or position >= self._ends[-1]:
            return f"token {position}"
        document = int(np.searchsorted(self._ends, position, side="right"))
        start = int(self._ends[document - 1]) if document else 0
        return f"token {position - start} of document {document}"


def outside(place: str, token: int, vocab_size: int) -> str:
    """The message that a token is not in the vocabulary."""
    return f"{place} is {token}, outside of the vocabulary (0 to {vocab_size - 1})"
