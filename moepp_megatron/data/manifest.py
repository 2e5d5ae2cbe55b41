"""`manifest.json`: what a prepared folder holds and what it was made from."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from moepp_megatron.config.json_file import read_json
from moepp_megatron.file_names import CHAT_TEMPLATE_FILE, DATA_MANIFEST_FILE, TOKENIZER_FILE

FORMAT_VERSION = 1
CORPUS = "corpus"
DOCUMENT_SOURCES = "sources.npy"
# Of conversations: what each token is, as an indexed dataset beside the corpus, and the template.
MARKS = "marks"
_OF_CORPUS = (f"{CORPUS}.idx", f"{CORPUS}.bin", TOKENIZER_FILE)
_OF_CONVERSATIONS = frozenset({f"{MARKS}.bin", f"{MARKS}.idx", CHAT_TEMPLATE_FILE})
FILES = (*_OF_CORPUS, DOCUMENT_SOURCES, *sorted(_OF_CONVERSATIONS))
"""All files that a folder may hold beside its manifest."""
# Every record of a run has numbers for each of them.
MAX_SOURCES = 64
CACHE = "cache"


@dataclasses.dataclass(frozen=True)
class SourceSummary:
    """One source.

    Attributes:
        name: the name that the user gave.
        files: number of files.
        bytes: their size.
        documents: documents kept.
        skipped: documents left out.
        tokens: tokens of the documents kept, EOD included.
    """

    name: str
    files: int
    bytes: int
    documents: int
    skipped: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The inputs that decide the bytes of a prepared folder.

    Attributes:
        settings: every setting but the number of workers, which changes nothing.
        content_sha256: SHA-256 over names and contents of the source files.
        stat_sha256: SHA-256 over names, sizes and modification times, which needs no reading.
    """

    settings: dict[str, str | int | None]
    content_sha256: str
    stat_sha256: str


@dataclasses.dataclass(frozen=True)
class Conversations:
    """What a folder of conversations holds.

    Attributes:
        sequence_length: tokens of each document of the corpus, which is a sequence of whole
            conversations with padding behind them.
        conversations: number of conversations.
        answer_tokens: tokens with loss.
        padding_tokens: padding.
    """

    sequence_length: int
    conversations: int
    answer_tokens: int
    padding_tokens: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The manifest.

    Attributes:
        format_version: version of the folder's layout.
        sources: one entry per SOURCE argument.
        documents: number of documents = sequences of the indexed dataset.
        skipped: documents left out.
        skipped_reasons: the same by reason.
        tokens: number of tokens, EOD included.
        vocab_size: size of the vocabulary; all ids are smaller.
        eod_id: id of the token that ends every document.
        eod_token: its name in the tokenizer.
        tokenizer_sha256: SHA-256 of `tokenizer.json`.
        files: sizes in bytes of the other files, to notice a damaged folder.
        inputs: what it was made from.
        sha256: SHA-256 of `corpus.bin` and `corpus.idx`; None in folders of earlier versions.
        split: weights of train, validation and test by documents, in the form of `data.split`; None
            if the corpus prescribes none.
        chat: what conversations the folder holds; None if it holds text.
    """

    format_version: int
    sources: list[SourceSummary]
    documents: int
    skipped: int
    skipped_reasons: dict[str, int]
    tokens: int
    vocab_size: int
    eod_id: int
    eod_token: str
    tokenizer_sha256: str
    files: dict[str, int]
    inputs: Inputs
    sha256: dict[str, str] | None = None
    split: str | None = None
    chat: Conversations | None = None

    def write(self, folder: Path) -> None:
        """Write `folder/manifest.json`."""
        text = json.dumps(dataclasses.asdict(self), indent=2)
        (folder / DATA_MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read `folder/manifest.json`.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged or of another format version.
        """
        try:
            values: Any = read_json(folder / DATA_MANIFEST_FILE)
            if values["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format_version is {values['format_version']}")
            values["sources"] = [SourceSummary(**source) for source in values["sources"]]
            values["inputs"] = Inputs(**values["inputs"])
            if values.get("chat") is not None:
                values["chat"] = Conversations(**values["chat"])
            manifest = cls(**values)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a manifest ({error})") from error
        if not manifest._is_sound():
            raise ValueError("not a manifest (numbers or files are missing)")
        return manifest

    def _is_sound(self) -> bool:
        numbers = [self.documents, self.tokens, self.vocab_size, self.eod_id]
        if self.chat is not None:
            numbers += dataclasses.astuple(self.chat)
        return (
            all(type(number) is int and number >= 0 for number in numbers)
            and isinstance(self.files, dict)
            and set(self.files) - {DOCUMENT_SOURCES}
            == set(_OF_CORPUS) | (set() if self.chat is None else _OF_CONVERSATIONS)
            and all(type(size) is int for size in self.files.values())
            and isinstance(self.sha256, dict | None)
            and isinstance(self.split, str | None)
        )

    @property
    def is_bare(self) -> bool:
        """Whether it is read off files made elsewhere: tokenizer and vocabulary are not known."""
        return not self.tokenizer_sha256

    def prefix(self, path: Path) -> Path:
        """The prefix of the indexed dataset that a setting names as `path`."""
        return path if self.is_bare else path / CORPUS

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the data sources; SOURCE arguments of one name are one of them."""
        return tuple(dict.fromkeys(source.name for source in self.sources))

    @property
    def identity(self) -> str:
        """SHA-256 that is equal for folders with the same tokens, wherever and whenever made."""
        parts = {
            "settings": self.inputs.settings,
            "content": self.inputs.content_sha256,
            "tokenizer": self.tokenizer_sha256,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def sha256_of(self, name: str) -> str | None:
        """SHA-256 of a file as it was written; None where an earlier version has not kept it."""
        if name == TOKENIZER_FILE:
            return self.tokenizer_sha256
        return None if self.sha256 is None else self.sha256.get(name)

    def is_intact(self, folder: Path) -> bool:
        """Whether all files are there in full."""
        return all(
            (folder / name).is_file() and (folder / name).stat().st_size == size
            for name, size in self.files.items()
        )
