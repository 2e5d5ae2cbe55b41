"""`manifest.json`: what a prepared folder holds and what it was made from."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from moepp_megatron.config.errors import ConfigError, first_misfit
from moepp_megatron.config.json_file import read_json
from moepp_megatron.file_names import CHAT_TEMPLATE_FILE, DATA_MANIFEST_FILE, TOKENIZER_FILE

FORMAT_VERSION = 1
CORPUS = "corpus"
DOCUMENT_SOURCES = "sources.npy"
# Of conversations: what each token is, as an indexed dataset next to the corpus, and the template.
MARKS = "marks"
_OF_CORPUS = (f"{CORPUS}.idx", f"{CORPUS}.bin", TOKENIZER_FILE)
_OF_CONVERSATIONS = frozenset({f"{MARKS}.bin", f"{MARKS}.idx", CHAT_TEMPLATE_FILE})
FILES = (*_OF_CORPUS, DOCUMENT_SOURCES, *sorted(_OF_CONVERSATIONS))
"""All files that a folder may hold besides its manifest."""
# Every record of a run has numbers for each of them.
MAX_SOURCES = 64
CACHE = "cache"
_OURS = frozenset({DATA_MANIFEST_FILE, CACHE, *FILES})
# That decide the bytes of a folder.
Settings = dict[str, str | int | None]


Count = Annotated[int, Field(ge=0)]
"""Checked where a manifest is read."""


@dataclasses.dataclass(frozen=True)
class SourceSummary:
    """One source."""

    name: str
    files: Count
    bytes: Count
    documents: Count
    skipped: Count
    tokens: Count


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The inputs that decide the bytes of a prepared folder.

    `settings` are all but the number of workers, which changes nothing. `content_sha256` is over
    names and contents of the source files, `stat_sha256` over names, sizes and modification times,
    which needs no reading.
    """

    settings: Settings
    content_sha256: str
    stat_sha256: str


@dataclasses.dataclass(frozen=True)
class Conversations:
    """Contents of a conversation folder.

    A document of the corpus has `sequence_length` tokens: whole conversations, and padding after
    them. `answer_tokens` are those with loss.
    """

    sequence_length: Count
    conversations: Count
    answer_tokens: Count
    padding_tokens: Count


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The manifest.

    Attributes:
        format_version: version of the folder's layout.
        sources: one entry per SOURCE argument.
        documents: number of documents = sequences of the indexed dataset.
        skipped: documents left out, also by reason in `skipped_reasons`.
        tokens: number of tokens, EOD included.
        vocab_size: size of the vocabulary; all ids are smaller.
        eod_id: id of the token that ends every document; `eod_token` is its name.
        files: sizes in bytes of the other files, to notice a damaged folder.
        sha256: SHA-256 of `corpus.bin` and `corpus.idx`; None in folders of earlier versions.
        split: weights of train, validation and test by documents, in the form of `data.split`; None
            if the corpus prescribes none.
        chat: what conversations the folder holds; None if it holds text.
    """

    format_version: int
    sources: list[SourceSummary]
    documents: Count
    skipped: Count
    skipped_reasons: dict[str, int]
    tokens: Count
    vocab_size: Count
    eod_id: Count
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

        Raises FileNotFoundError if there is none, ValueError if it is damaged or of another
        version.
        """
        values = read_json(folder / DATA_MANIFEST_FILE)
        version = values.get("format_version") if isinstance(values, dict) else None
        if version != FORMAT_VERSION:
            raise ValueError(f"not a manifest of this version (format_version is {version})")
        try:
            manifest = TypeAdapter(cls).validate_json(json.dumps(values), strict=True)
        except ValidationError as error:
            raise ValueError(f"not a manifest ({': '.join(first_misfit(error))})") from None
        wanted = set(_OF_CORPUS) | (set() if manifest.chat is None else _OF_CONVERSATIONS)
        if set(manifest.files) - {DOCUMENT_SOURCES} != wanted:
            raise ValueError("not a manifest (files are missing)")
        return manifest

    @property
    def is_bare(self) -> bool:
        """True for files made elsewhere: tokenizer and vocabulary are not known."""
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
        """SHA-256 that is equal for folders with the same tokens and split, wherever made."""
        parts = {
            "settings": self.inputs.settings,
            "content": self.inputs.content_sha256,
            "tokenizer": self.tokenizer_sha256,
            **({} if self.split is None else {"split": self.split}),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def sha256_of(self, name: str) -> str | None:
        """SHA-256 of a file as it was written; None where an earlier version has not kept it."""
        if name == TOKENIZER_FILE:
            return self.tokenizer_sha256
        return None if self.sha256 is None else self.sha256.get(name)

    def is_intact(self, folder: Path) -> bool:
        """True if all files are complete."""
        return all(
            (folder / name).is_file() and (folder / name).stat().st_size == size
            for name, size in self.files.items()
        )

    @classmethod
    def find_reusable(
        cls,
        out: Path,
        settings: Settings,
        stat_sha256: str,
        content_sha256: Callable[[], str],
        force: bool,
    ) -> "Manifest | None":
        """Return the manifest of the same data in `out`, or None if the folder must be written.

        Raises ConfigError if something is there that must not be overwritten.
        """
        if not out.exists():
            return None
        if not out.is_dir():
            raise ConfigError(f"--out ({out}) must be a folder, but is a file; choose another")
        names = {path.name for path in out.iterdir()}
        # Never remove what this command has not written, not even with --force.
        if names and (DATA_MANIFEST_FILE not in names or names - _OURS):
            stranger = min(names - _OURS or names)
            raise ConfigError(
                f"--out ({out}) must be a new or empty folder, or one written by this command, but "
                f"holds {stranger}; choose another"
            )
        if not names or force:
            return None
        try:
            manifest = cls.read(out)
            difference = manifest._difference(out, settings, stat_sha256, content_sha256)
        except ValueError as error:
            difference = f"its manifest is unusable: {error}"
        if difference:
            raise ConfigError(
                f"--out ({out}) already holds another dataset ({difference}); "
                "pass --force to replace it or choose another folder"
            )
        return manifest

    def _difference(
        self,
        out: Path,
        settings: Settings,
        stat_sha256: str,
        content_sha256: Callable[[], str],
    ) -> str:
        if not self.is_intact(out):
            return "it is damaged: files are missing or cut short"
        there = self.inputs
        for name in there.settings | settings:
            before, value = there.settings.get(name), settings.get(name)
            if before != value:
                return f"{name} is {before}, not {value}"
        if there.stat_sha256 != stat_sha256 and there.content_sha256 != content_sha256():
            return "the sources differ"
        return ""
