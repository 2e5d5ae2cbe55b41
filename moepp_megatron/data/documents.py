"""Reads documents from source files, in pieces small enough to spread over processes.

How files are cut into pieces depends only on the files, never on the number of workers, so the
order of documents does not either.
"""

import json
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.data.source_files import (
    CONVERSATION_KEYS,
    TABLES,
    SourceFile,
    unpacked_limit,
)
from moepp_megatron.data.sources import TextSource

# A JSON object, or a row of a table.
Record = dict[str, Any]

PIECE_BYTES = 256 * 1024

UNCUTTABLE = "too long to be tokenized whole, and cannot be cut"
_CONVERSATION = "a conversation, without --chat"
_EMPTY = "empty"
_NOT_TEXT = "not UTF-8 text"
_NOT_JSON = "not a JSON object"
_HEAD_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Skipped:
    """A document that cannot be used, and why."""

    reason: str


@dataclass(frozen=True)
class _DocumentPart:
    """Bytes [start, end) of a text or of JSONL, or row groups [start, end) of a table."""

    file: SourceFile
    start: int
    end: int
    # Characters that the values of a table may have: a dictionary of it has each value once.
    most: int = 0

    def records(self, column: str | None = None) -> Iterator[Record | Skipped]:
        """Yield JSON objects or rows, of a table perhaps one column only, or why one is skipped."""
        file = self.file
        if file.format in TABLES:
            left = self.most
            for row in file.rows(range(self.start, self.end), column):
                values = () if row is None else row.values()
                left -= sum(
                    len(value if isinstance(value, str) else str(value)) for value in values
                )
                if left < 0:
                    raise file.too_large()
                yield Skipped(_NOT_TEXT) if row is None else row
            return
        for line in self._lines():
            if line.strip():
                yield _record(line)

    def _lines(self) -> Iterator[bytes]:
        """The lines that start in it."""
        file = self.file
        with file.open() as stream:
            if file.compression is not None:
                yield from stream
                return
            if self.start:
                # From one byte before: where a line starts exactly at `start` this drops only "\n".
                stream.seek(self.start - 1)
                rest = stream.readline(self.end - self.start + 1)
                if not rest.endswith(b"\n"):
                    # A line that continues beyond this part, and is not read again from here.
                    return
            while stream.tell() < self.end:
                yield stream.readline()


@dataclass(frozen=True)
class Piece:
    """Unit of work of one worker."""

    source: int
    parts: tuple[_DocumentPart, ...]
    size: int
    group: str | None = None

    def documents(self, text_key: str) -> Iterator[str | Skipped]:
        """Yield every document, or why it is skipped."""
        for part in self.parts:
            if part.file.format == "text":
                yield _text_of(part.file)
            else:
                for record in part.records(text_key):
                    yield record if isinstance(record, Skipped) else _record_text(record, text_key)


def plan_pieces(sources: Sequence[TextSource], text_key: str | None) -> list[Piece]:
    """Cut all sources into pieces, in reading order.

    Raises ConfigError for a table that is damaged or lacks the column, for one without pyarrow, and
    for a text that is JSONL.
    """
    pieces: list[Piece] = []
    for index, source in enumerate(sources):
        pending: list[_DocumentPart] = []
        pending_size = 0
        group: str | None = None
        for file in source.files:
            if text_key is not None:
                _refuse_records(file, text_key)
            for part, size in _parts(file, text_key):
                is_full = pending_size + size > PIECE_BYTES
                if pending and (is_full or file.group != group):
                    pieces.append(Piece(index, tuple(pending), pending_size, group))
                    pending, pending_size = [], 0
                pending.append(part)
                pending_size += size
                group = file.group
        pieces.append(Piece(index, tuple(pending), pending_size, group))
    return pieces


def _parts(file: SourceFile, text_key: str | None) -> Iterator[tuple[_DocumentPart, int]]:
    if file.compression is not None or file.format == "text":
        yield _DocumentPart(file, 0, file.size), file.size
    elif file.format == "jsonl":
        for start in range(0, file.size, PIECE_BYTES):
            end = min(start + PIECE_BYTES, file.size)
            yield _DocumentPart(file, start, end), end - start
    else:
        # A table, or refused there.
        groups = file.count_groups(text_key)
        most = unpacked_limit(file.path) // max(groups, 1)
        for group in range(groups):
            yield _DocumentPart(file, group, group + 1, most), file.size // groups


def _refuse_records(file: SourceFile, text_key: str) -> None:
    """Refuse `.json` that holds records: it would be one text, with all keys and quotes in it."""
    names = [suffix.lower() for suffix in file.path.suffixes[-2:]]
    if file.format != "text" or ".json" not in names:
        return
    records = list(islice(_DocumentPart(file, 0, file.size).records(), 2))
    if len(records) == 2 and all(_is_record(each, text_key) for each in records):
        raise ConfigError(
            f"source {file.path} must be a text, and has a record in each line; rename it to "
            ".jsonl (or .jsonl.gz), and each line is a document"
        )
    if _is_record(_first_of_array(file), text_key):
        raise ConfigError(
            f"source {file.path} must be a text, and is an array of records; write one in each "
            f"line: jq -c '.[]' {shlex.quote(str(file.path))} > FILE.jsonl"
        )


def _is_record(record: object, text_key: str) -> bool:
    return isinstance(record, dict) and (text_key in record or _is_conversation(record))


def _is_conversation(record: Record) -> bool:
    return any(keys <= record.keys() for keys in CONVERSATION_KEYS)


def _first_of_array(file: SourceFile) -> object:
    """The first value of a file that begins as an array of JSON; None for any other."""
    with file.open() as stream:
        head = stream.read(_HEAD_BYTES).decode("utf-8-sig", errors="ignore").lstrip()
    try:
        return json.JSONDecoder().raw_decode(head[1:].lstrip())[0] if head[:1] == "[" else None
    except (ValueError, RecursionError):
        return None


def check_usable(sources: Sequence[TextSource], pieces: Sequence[Piece], text_key: str) -> None:
    """Raise ConfigError for a source without a usable document, before hours go to the others."""
    for index, source in enumerate(sources):
        skipped: Counter[str] = Counter()
        own = (piece.documents(text_key) for piece in pieces if piece.source == index)
        for document in chain.from_iterable(own):
            if not isinstance(document, Skipped):
                break
            skipped[document.reason] += 1
        else:
            raise no_usable_document(source, skipped)


def no_usable_document(source: TextSource, skipped: Counter[str]) -> ConfigError:
    """The error of a source of which every document is left out, with what to do about it."""
    reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(skipped.items()))
    remedy = "name UTF-8 text, JSONL or parquet, and the right --text-key"
    if skipped[_CONVERSATION]:
        remedy = "prepare conversations with --chat, --tokenizer and --seq-length"
    elif skipped[_NOT_TEXT]:
        file = shlex.quote(str(source.files[0].path))
        remedy = (
            "unpack archives, and encode text as UTF-8, such as by: "
            f"iconv -f UTF-16 -t UTF-8 {file} > FILE.txt"
        )
    elif skipped[UNCUTTABLE]:
        remedy = "cut it into several documents"
    return ConfigError(
        f"source {source.name} has no usable document ({reasons or 'no records'}); {remedy}"
    )


def _usable(text: str) -> str | Skipped:
    # Without `strip`, which would copy the text.
    return Skipped(_EMPTY) if not text or text.isspace() else text


def _text_of(file: SourceFile) -> str | Skipped:
    # Not within a generator, which would hold the bytes for as long as the text is in use.
    with file.open() as stream:
        data = stream.read()
    if b"\0" in data:
        return Skipped(_NOT_TEXT)
    try:
        # A byte order mark is no part of the text.
        return _usable(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Skipped(_NOT_TEXT)


def _record(line: bytes) -> Record | Skipped:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Skipped(_NOT_TEXT)
    except (ValueError, RecursionError):
        return Skipped(_NOT_JSON)
    return record if isinstance(record, dict) else Skipped(_NOT_JSON)


def _record_text(record: Record, text_key: str) -> str | Skipped:
    text = record.get(text_key)
    if text is None and text_key in record:
        return Skipped(_EMPTY)
    if not isinstance(text, str):
        is_chat = _is_conversation(record)
        return Skipped(_CONVERSATION if is_chat else f"no text under the key {text_key}")
    return _usable(text) if is_utf8(text) else Skipped(_NOT_TEXT)


def is_utf8(text: str) -> bool:
    """True if a text can be written: JSON can spell half a surrogate pair, which cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
