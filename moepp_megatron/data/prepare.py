"""`moepp data prepare`: turns sources into a folder with indexed dataset, tokenizer, manifest."""

import hashlib
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.data.chat_template import ChatTemplate
from moepp_megatron.data.corpus import WrittenCorpus, spool_corpus, write_indexed_dataset
from moepp_megatron.data.documents import Piece, Skipped, check_usable, plan_pieces
from moepp_megatron.data.encoding import encode_pieces, token_dtype
from moepp_megatron.data.external_tokenizers import ExternalTokenizer
from moepp_megatron.data.manifest import FORMAT_VERSION, Inputs, Manifest, Settings
from moepp_megatron.data.prepare_chat import check_formats, write_chat
from moepp_megatron.data.progress import track
from moepp_megatron.data.sources import (
    content_fingerprint,
    resolve_sources,
    stat_fingerprint,
)
from moepp_megatron.data.tokenizer import Tokenizer, check_vocab_size, train_tokenizer
from moepp_megatron.file_names import TOKENIZER_FILE
from moepp_megatron.runtime.atomic import partial_folder, publish
from moepp_megatron.runtime.optional import quiet
from moepp_megatron.runtime.terminal import Console

_DEFAULT_VOCAB_SIZE = 4096
# Characters the tokenizer is trained on. Merges hardly change beyond a few MB, time does.
_SAMPLE_CHARACTERS = 8_000_000


@dataclass(frozen=True)
class PrepareSettings:
    """Options.

    Attributes:
        vocab_size: vocabulary size of a tokenizer to be trained; None means 4096.
        tokenizer: an existing tokenizer instead: a `tokenizer.json`, a Hugging Face folder, a
            sentencepiece model or a file of tiktoken's ranks.
        eod_token: its end-of-document token; None means the first known name it has.
        text_key: JSONL key and parquet column that hold the text.
        seed: seed of the document order and the tokenizer's sample.
        workers: processes; None means one per core. The result does not depend on it.
        force: replace a dataset that is already there.
        chat: sources hold conversations.
        sequence_length: tokens of a sequence of conversations, the model's.
        template: a chat template; None means the tokenizer's.
    """

    vocab_size: int | None = None
    tokenizer: Path | None = None
    eod_token: str | None = None
    text_key: str = "text"
    seed: int = 1234
    workers: int | None = None
    force: bool = False
    chat: bool = False
    sequence_length: int | None = None
    template: Path | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError for a value out of range, or two that exclude each other."""
        self._check_chat()
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"--workers ({self.workers}) must be at least 1; leave it out")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"--seed ({self.seed}) must be between 0 and 4294967295; use 1234")
        if self.tokenizer is not None and self.vocab_size is not None:
            raise ConfigError(
                f"--vocab-size ({self.vocab_size}) cannot be combined with --tokenizer "
                f"({self.tokenizer}), whose size is fixed; leave one of them out"
            )
        if self.tokenizer is None and self.eod_token is not None:
            raise ConfigError(
                f"--eod-token ({self.eod_token}) needs --tokenizer; leave it out to train one"
            )
        if self.vocab_size is not None:
            check_vocab_size(self.vocab_size)

    def _check_chat(self) -> None:
        options = [("--seq-length", self.sequence_length), ("--template", self.template)]
        for name, value in options:
            if not self.chat and value is not None:
                raise ConfigError(f"{name} ({value}) needs --chat; add it, or leave {name} out")
        if not self.chat:
            return
        if self.workers is not None:
            raise ConfigError(
                f"--workers ({self.workers}) cannot be combined with --chat, which encodes in one "
                "process; leave it out"
            )
        if self.text_key != "text":
            raise ConfigError(
                f"--text-key ({self.text_key}) cannot be combined with --chat, which reads the key "
                "messages; leave it out"
            )
        if self.tokenizer is None:
            raise ConfigError(
                "--chat needs --tokenizer, that of the model to be tuned; name its tokenizer.json "
                "or the folder of its data or checkpoint"
            )
        if self.sequence_length is None or self.sequence_length < 2:
            raise ConfigError(
                f"--seq-length ({self.sequence_length}) must be at least 2 with --chat; give the "
                "model.seq_length of the model to be tuned"
            )

    @property
    def trained_size(self) -> int:
        """Vocabulary size of a tokenizer to be trained, the default resolved."""
        return self.vocab_size or _DEFAULT_VOCAB_SIZE

    def deciding(self, given: ExternalTokenizer | None) -> Settings:
        """The settings that decide the bytes written; `given` is what `tokenizer` names."""
        return {
            "vocab_size": self.trained_size if self.tokenizer is None else None,
            "tokenizer": None if given is None else given.identity,
            "eod_token": self.eod_token,
            "text_key": self.text_key,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class _Prepared:
    """The outcome: the folder's manifest, and whether it had been there already."""

    manifest: Manifest
    up_to_date: bool


def prepare(
    names: str | Path | Sequence[str | Path],
    out: str | Path,
    settings: PrepareSettings | None = None,
    console: Console | None = None,
) -> _Prepared:
    """Write the dataset folder `out`, or find it up to date.

    The folder appears complete or not at all, and an interrupted run leaves an older one as it was.

    Args:
        names: files, folders, or the word `stdlib`: one, or several.
        out: the folder.
        settings: how; by default a tokenizer of 4096 tokens is trained.
        console: shows the progress; by default this process's output.

    Returns:
        The folder's manifest, with counts of documents and tokens.

    Raises:
        ConfigError: settings, sources or output folder cannot be used.
        UnfitError: a package that reads the tokenizer is missing.
    """
    quiet()
    settings, console = settings or PrepareSettings(), console or Console()
    names = [names] if isinstance(names, str | Path) else names
    out = Path(os.path.abspath(out))
    # Before sources are read, which may take an hour.
    named, eod_token = settings.tokenizer, settings.eod_token
    given = None if named is None else ExternalTokenizer.open(named, eod_token)
    deciding, template = settings.deciding(given), None
    if settings.chat:
        assert named is not None, "the settings have been checked"
        assert given is not None, "it has been opened"
        template = ChatTemplate.find(named, given.tokenizer, settings.template)
        deciding |= {
            "sequence_length": settings.sequence_length,
            "template": hashlib.sha256(template.text.encode()).hexdigest(),
        }
    sources = resolve_sources([str(name) for name in names], out)
    stat_sha256 = stat_fingerprint(sources)
    reusable = Manifest.find_reusable(
        out, deciding, stat_sha256, lambda: content_fingerprint(sources), settings.force
    )
    if reusable:
        return _Prepared(reusable, up_to_date=True)
    if template is not None:
        check_formats(sources)
    pieces = plan_pieces(sources, None if settings.chat else settings.text_key)
    if template is None:
        check_usable(sources, pieces, settings.text_key)
        if given is not None:
            given.check(_sample(pieces, settings))
    # Before sources are read, too: whether the folder can be written.
    with partial_folder(out) as partial:
        with track(console, "read", sum(source.size for source in sources)) as advance:
            inputs = Inputs(deciding, content_fingerprint(sources, advance), stat_sha256)
        files = [file for source in sources for file in source.files]
        unchecked = [f.path for f in files if f.lacks_checksum()]
        if unchecked:
            console.print_line(
                f"warning: files without a checksum ({len(unchecked)}, such as {unchecked[0]}): "
                "damage in them goes unnoticed; `zstd` writes one"
            )
        if given is None:
            tokenizer = _make_tokenizer(pieces, settings, console)
            tokenizer.save(partial / TOKENIZER_FILE)
        else:
            tokenizer = given.tokenizer
            (partial / TOKENIZER_FILE).write_bytes(given.content)
        if template is None:
            encoded = encode_pieces(
                pieces,
                partial / TOKENIZER_FILE,
                tokenizer.eod_token,
                settings.text_key,
                settings.workers or len(os.sched_getaffinity(0)),
                meanwhile=_import_megatron,
            )
            dtype = token_dtype(tokenizer.vocab_size)
            with track(console, "tokenize", sum(piece.size for piece in pieces)) as advance:
                spooled = spool_corpus(encoded, sources, dtype, partial / "spool", advance)
            written = write_indexed_dataset(spooled, partial, settings.seed)
        else:
            assert settings.sequence_length is not None, "the settings have been checked"
            length, seed = settings.sequence_length, settings.seed
            written = write_chat(pieces, sources, template, length, seed, partial, console)
        manifest = _manifest(written, tokenizer, inputs, partial)
        manifest.write(partial)
        publish(partial, out)
    return _Prepared(manifest, up_to_date=False)


def _make_tokenizer(
    pieces: Sequence[Piece], settings: PrepareSettings, console: Console
) -> Tokenizer:
    size = settings.trained_size
    if settings.vocab_size is None:
        console.print_line(
            f"tokenizer: {size} tokens by default, for models as small as the quickstart's; for "
            "others pass their model.vocab_size as --vocab-size, or a --tokenizer"
        )
    texts = list(_sample(pieces, settings))
    console.print_line(
        f"tokenizer: training {size} tokens on {sum(map(len, texts)) / 1e6:.1f} M characters"
    )
    tokenizer = train_tokenizer(texts, size)
    if tokenizer.vocab_size < size:
        console.print_line(
            f"tokenizer: {tokenizer.vocab_size} tokens, not {size}: no further pair occurs twice"
        )
    return tokenizer


def _sample(pieces: Sequence[Piece], settings: PrepareSettings) -> Iterator[str]:
    """Documents of randomly chosen pieces up to SAMPLE_CHARACTERS in all."""
    left = _SAMPLE_CHARACTERS
    for piece in random.Random(settings.seed).sample(pieces, len(pieces)):
        for document in piece.documents(settings.text_key):
            if left and not isinstance(document, Skipped):
                yield document[:left]
                left -= min(left, len(document))
        if not left:
            return


def _import_megatron() -> None:
    # Several seconds, needed at the end only: hidden behind the workers.
    import megatron.core.datasets.indexed_dataset  # noqa: F401


def _manifest(
    written: WrittenCorpus, tokenizer: Tokenizer, inputs: Inputs, folder: Path
) -> Manifest:
    return Manifest(
        format_version=FORMAT_VERSION,
        sources=written.sources,
        documents=written.documents,
        skipped=written.skipped.total(),
        skipped_reasons=dict(sorted(written.skipped.items())),
        tokens=written.tokens,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod,
        eod_token=tokenizer.eod_token,
        tokenizer_sha256=hashlib.sha256((folder / TOKENIZER_FILE).read_bytes()).hexdigest(),
        files={name: (folder / name).stat().st_size for name in [*written.sha256, TOKENIZER_FILE]},
        inputs=inputs,
        sha256=written.sha256,
        split=written.split,
        chat=written.chat,
    )
