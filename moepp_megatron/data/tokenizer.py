"""The tokenizer: a Hugging Face `tokenizers` file and its end-of-document token."""

import functools
import hashlib
import itertools
import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.config.json_file import read_json
from moepp_megatron.config.paths import looked_at
from moepp_megatron.config.regular_file import check_regular
from moepp_megatron.data.long_text import (
    MAX_PIECE_CHARACTERS,
    PIECE_CHARACTERS,
    UncuttableError,
    can_cut,
    cut_text,
)
from moepp_megatron.data.manifest import Manifest
from moepp_megatron.file_names import DATA_MANIFEST_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE

EOD_TOKEN = "<|endoftext|>"
# What the tokenizers of published models call it, tried in this order.
_KNOWN_EOD_TOKENS = (
    EOD_TOKEN,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)
_MIN_VOCAB_SIZE = 256 + 1  # every byte, and the end of a document
# The library takes 45 bytes of memory per token at once, and ends the process if there are none.
_MAX_VOCAB_SIZE = 10_000_000


class Tokenizer:
    """Encodes text without special tokens; the caller appends `eod` to end a document.

    It also has what megatron-core's `GPTDatasetConfig` needs of a tokenizer: `vocab_size`,
    `eod` and `unique_identifiers`.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eod_token: str) -> None:
        """Turn truncation and padding off; raise ConfigError if `eod_token` is unknown."""
        eod = backend.token_to_id(eod_token)
        if eod is None:
            raise ConfigError(
                f"--eod-token ({eod_token}) must be in the tokenizer's vocabulary; name one that is"
            )
        backend.no_truncation()
        backend.no_padding()
        # A document that spells the end-of-document token must not end there.
        backend.encode_special_tokens = True
        self._backend = backend
        self.eod_token = eod_token
        self.eod: int = eod
        # Ids may have holes, so the size of the table is not the number of tokens.
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def load(cls, path: Path, eod_token: str | None = None) -> "Tokenizer":
        """Load a `tokenizer.json`, also by its folder: prepared data, a checkpoint or another.

        Without `eod_token` the one that is named next to the file (`named_eod_token`) is taken, or
        else the first known name that is in the vocabulary. Raises ConfigError if there is no such
        file, no tokenizer, or no end-of-document token.
        """
        path = tokenizer_file(path)
        named = named_eod_token(path)
        backend = cls.read_backend(path)
        if eod_token is None and named is not None and backend.token_to_id(named) is None:
            raise ConfigError(
                f"tokenizer ({path}) must have the end-of-document token ({named}) that "
                f"{DATA_MANIFEST_FILE} or {TOKENIZER_CONFIG_FILE} next to it names; correct the "
                "name there"
            )
        return cls(backend, eod_token or named or cls.known_eod(backend, path))

    @staticmethod
    def known_eod(backend: tokenizers.Tokenizer, path: Path) -> str:
        """Return a tokenizer's first known end-of-document token; raise ConfigError if none."""
        for token in _KNOWN_EOD_TOKENS:
            if backend.token_to_id(token) is not None:
                return token
        raise ConfigError(
            f"tokenizer ({path}) has no known end-of-document token "
            f"({', '.join(_KNOWN_EOD_TOKENS[:3])}, ...); name its own with --eod-token"
        )

    @staticmethod
    def read_backend(path: Path) -> tokenizers.Tokenizer:
        """Return the library's tokenizer of a file, whatever its end-of-document token is.

        Raises ConfigError if it cannot be read, or is not a tokenizer.
        """
        try:
            check_regular(path)
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"tokenizer ({path}) cannot be read ({error.strerror}){looked_at(path)}; name a "
                "tokenizer.json or its folder"
            ) from error
        except UnicodeDecodeError:
            # A sentencepiece model, most often: tokenizer.model next to the file that is wanted.
            raise ConfigError(
                f"tokenizer ({path}) must be a Hugging Face tokenizer.json, and is no text; for a "
                "sentencepiece model name the tokenizer.json next to it, or have transformers "
                "write one: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            ) from None
        with _checked(f"tokenizer ({path}) must be a Hugging Face tokenizer.json"):
            return tokenizers.Tokenizer.from_str(text)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; nothing is added."""
        return list(itertools.chain.from_iterable(self.encode_in_pieces(text)))

    def encode_in_pieces(self, text: str) -> Iterator[list[int]]:
        """Yield token ids piece by piece, for less memory if `cuts_long_texts`.

        Raises UncuttableError if a piece would be too long.
        """
        for piece in cut_text(text) if self.cuts_long_texts else [text]:
            if len(piece) > MAX_PIECE_CHARACTERS:
                raise UncuttableError
            # The batch call is the one that skips the character offsets, which nobody needs here.
            with _checked("tokenizer cannot encode a text"):
                encodings = self._backend.encode_batch_fast([piece], add_special_tokens=False)
            yield encodings[0].ids

    @functools.cached_property
    def cuts_long_texts(self) -> bool:
        """True if long texts are encoded in pieces, with the tokens of the whole."""
        return can_cut(self._backend)

    def encode_with_spans(
        self, text: str, has_special_tokens: bool = False
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Return token ids, and for each its first character and the one after its last.

        Tokens of one character that a byte-level tokenizer has split all span that character.
        Special tokens that the text spells are meant as such if `has_special_tokens`.
        """
        backend = self._backend
        # Nothing is added to the text, so all that a post-processor could do is to trim spans: that
        # of Llama 3 leaves a token of white space an empty one.
        processor, backend.post_processor = backend.post_processor, None
        backend.encode_special_tokens = not has_special_tokens
        try:
            with _checked("tokenizer cannot encode a text"):
                encoding = backend.encode(text, add_special_tokens=False)
        finally:
            backend.encode_special_tokens, backend.post_processor = True, processor
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens appear by name."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def save(self, path: Path) -> None:
        """Write a `tokenizer.json`."""
        path.write_bytes(self.content())

    def content(self) -> bytes:
        """Its `tokenizer.json`."""
        return (self._backend.to_str(pretty=True) + "\n").encode()

    @functools.cached_property
    def special_tokens(self) -> dict[int, str]:
        """Tokens by id that stand for themselves, not for the text that spells them; `eod` too."""
        added = self._backend.get_added_tokens_decoder()
        special = {index: token.content for index, token in added.items() if token.special}
        return special | {self.eod: self.eod_token}

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token's id, added tokens included."""
        return self._backend.get_vocab(with_added_tokens=True)

    @property
    def unique_identifiers(self) -> "OrderedDict[str, str]":
        """Identifies this tokenizer in the keys of megatron-core's index cache."""
        digest = hashlib.sha256(self._backend.to_str().encode()).hexdigest()
        return OrderedDict(sha256=digest, eod_token=self.eod_token)


def tokenizer_file(path: Path) -> Path:
    """The `tokenizer.json` at a path, which may also be its folder."""
    return path / TOKENIZER_FILE if path.is_dir() else path


@contextmanager
def _checked(problem: str) -> Iterator[None]:
    """A block in which the library raises no narrower class, or one that is not an `Exception`."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{problem} ({reason}); fetch it again") from error


def check_vocab_size(vocab_size: int) -> None:
    """Raise ConfigError if `vocab_size` is not from 257 (every byte, and EOD) to 10,000,000."""
    if vocab_size > _MAX_VOCAB_SIZE:
        raise ConfigError(
            f"--vocab-size ({vocab_size}) must be at most {_MAX_VOCAB_SIZE}; use 65536 for the "
            "models of the paper"
        )
    if vocab_size < _MIN_VOCAB_SIZE:
        raise ConfigError(
            f"--vocab-size ({vocab_size}) must be at least {_MIN_VOCAB_SIZE} (256 bytes and the "
            "end-of-document token); use 4096"
        )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer (GPT-2's kind): every text round-trips.

    It has `vocab_size` tokens, or fewer where a small corpus has fewer repeated pairs. Raises
    ConfigError if that is below 257 or above 10,000,000.
    """
    check_vocab_size(vocab_size)
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[EOD_TOKEN],
        # All 256 bytes, so that no text is ever out of vocabulary.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Pairs are counted within pre-tokens, so that cutting texts changes only memory. A pre-token
    # that is longer than a piece takes the trainer minutes, and its beginning has the same pairs.
    pieces = (piece[:PIECE_CHARACTERS] for text in texts for piece in cut_text(text))
    backend.train_from_iterator(pieces, trainer)
    return Tokenizer(backend, EOD_TOKEN)


def named_eod_token(path: Path) -> str | None:
    """The end-of-document token that the folder of a `tokenizer.json` names; None if it does not.

    That is the token that `moepp data prepare` was run with, from its manifest, or the `eos_token`
    of a `tokenizer_config.json`, which checkpoints of ours and Hugging Face's models have.
    """
    if path.name != TOKENIZER_FILE:
        return None
    try:
        return Manifest.read(path.parent).eod_token
    except (OSError, ValueError):
        pass  # no prepared folder
    return spelling(read_tokenizer_config(path.parent).get("eos_token")) or None


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """The content of a folder's `tokenizer_config.json`; empty if there is none to be read."""
    try:
        content = read_json(folder / TOKENIZER_CONFIG_FILE)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def spelling(token: Any) -> str | None:
    """A special token as `tokenizer_config.json` names it; older files describe it instead."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def tokenizer_config(eod_token: str) -> bytes:
    """A `tokenizer_config.json` that names the token; transformers reads it as well."""
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eod_token}
    return (json.dumps(content, indent=2) + "\n").encode()
