"""Tokenizers in other forms than `tokenizer.json`: turned into one, and held to their own library.

sentencepiece models, tiktoken's files of ranks, and Hugging Face folders without a
`tokenizer.json`. What is converted must give the ids of the original on difficult texts and on the
user's own; a conversion that does not is refused.
"""

import base64
import binascii
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from moepp_megatron.config.errors import ConfigError, UnfitError
from moepp_megatron.config.paths import hub_id
from moepp_megatron.config.regular_file import check_regular
from moepp_megatron.data.long_text import PATTERNS
from moepp_megatron.data.tokenizer import Tokenizer, tokenizer_file
from moepp_megatron.file_names import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from moepp_megatron.runtime.optional import how_to_install

# A file of ranks holds neither pattern nor special tokens; both follow from the number of ranks.
# Special tokens are counted from there; an id that has no token gets a name.
_ENCODINGS: dict[int, tuple[str, tuple[str, ...]]] = {
    50256: ("gpt2", ("<|endoftext|>",)),
    100256: ("cl100k", ("<|unused_100256|>", "<|endoftext|>")),
    128000: ("cl100k", ("<|begin_of_text|>", "<|end_of_text|>")),
    151643: ("qwen2", ("<|endoftext|>",)),
    199998: ("o200k", ("<|unused_199998|>", "<|endoftext|>")),
}
_CHECKED_CHARACTERS = 200_000
# Of sentencepiece's pieces: normal and user-defined ones, control pieces; a score that no text
# outweighs.
_IN_TEXTS, _CONTROL, _NEVER = (1, 4), 3, -1.0e6
# Where conversions have been wrong: white space, digits, special tokens as text, rare characters.
_DIFFICULT = (
    "a",
    " a  b   c ",
    "\n\n x\n\ty \r\n",
    "\u2581 \u2581\u2581a",
    "It's 1234567 3.14 don't WE'LL",
    "<s> </s> <unk> <|endoftext|> <pad>x</s>",
    "na\u00efve \u2116 \u00bd \ufb01 e\u0301 \u00a0\u200b\u3000.",
    "\u4f60\u597d\uff0c\u4e16\u754c \u0645\u0631\u062d\u0628\u0627 \U0001f600\U0001f1e9\U0001f1ea",
    "def f(x):\n    return x[0]  # {}\n" * 3,
)


@dataclass(frozen=True)
class ExternalTokenizer:
    """The tokenizer that --tokenizer names, with the content of its `tokenizer.json`.

    `identity` is the SHA-256 of what was given. `original` gives the ids of a text by its own
    library; None for a `tokenizer.json`.
    """

    tokenizer: Tokenizer
    content: bytes
    identity: str
    original: Callable[[str], list[int]] | None = None

    @classmethod
    def open(cls, path: Path, eod_token: str | None) -> "ExternalTokenizer":
        """Open a `tokenizer.json`, its folder, or a tokenizer in another form.

        Without `eod_token` its end-of-document token is the one that is known. Raises ConfigError
        for what is no tokenizer, or none that can be converted, and UnfitError if a package that
        reads it is missing.
        """
        file = tokenizer_file(path)
        if path.is_dir() and not file.is_file():
            return _from_folder(path, eod_token)
        try:
            check_regular(file)
            content = file.read_bytes()
        except OSError as error:
            model = hub_id(str(path))
            fetch = f", or fetch it from the Hub: hf download {model} --include 'tokenizer*'"
            raise ConfigError(
                f"--tokenizer ({path}) cannot be read ({error.strerror}); name a file or its folder"
                + ("" if model is None else f"{fetch} --local-dir {model.split('/')[1]}")
            ) from None
        identity = hashlib.sha256(content).hexdigest()
        if content.lstrip()[:1] == b"{":
            return cls(Tokenizer.load(path, eod_token), content, identity)
        ranks = _read_ranks(content)
        if ranks is not None:
            backend, original = _from_ranks(path, ranks)
        elif _is_text(content):
            # Says what is wrong with it.
            return cls(Tokenizer.load(path, eod_token), content, identity)
        else:
            backend, original, own_eod = _from_sentencepiece(path, content)
            eod_token = eod_token or own_eod
        return _given(path, backend, eod_token, identity, original)

    def check(self, texts: Iterable[str]) -> None:
        """Raise ConfigError if `texts`, or difficult ones, get other ids than from the original."""
        if self.original is None:
            return
        left = _CHECKED_CHARACTERS
        for text in (*_DIFFICULT, *texts):
            expected, actual = self.original(text[:left]), self.tokenizer.encode(text[:left])
            if expected != actual:
                raise ConfigError(
                    f"--tokenizer: converted to {TOKENIZER_FILE} it gives {text[:30]!r} other ids "
                    "than its own library; give a tokenizer.json that its authors have made"
                )
            left -= len(text)
            if left <= 0:
                return


def _given(
    path: Path,
    backend: tokenizers.Tokenizer,
    eod_token: str | None,
    identity: str,
    original: Callable[[str], list[int]] | None,
) -> ExternalTokenizer:
    tokenizer = Tokenizer(backend, eod_token or Tokenizer.known_eod(backend, path))
    return ExternalTokenizer(tokenizer, tokenizer.content(), identity, original)


def _is_text(content: bytes) -> bool:
    try:
        return "\0" not in content.decode()
    except UnicodeDecodeError:
        return False


def _needed(path: Path, what: str, command: str) -> UnfitError:
    return UnfitError(f"--tokenizer ({path}) is {what}; {command}")


def _from_folder(path: Path, eod_token: str | None) -> ExternalTokenizer:
    """A Hugging Face folder whose tokenizer transformers knows how to convert."""
    if not (path / TOKENIZER_CONFIG_FILE).is_file():
        raise ConfigError(
            f"--tokenizer ({path}) must hold {TOKENIZER_FILE} or {TOKENIZER_CONFIG_FILE}; name a "
            "folder that does, or the tokenizer's file"
        )
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise _needed(
            path,
            f"a folder without {TOKENIZER_FILE}, which needs transformers",
            how_to_install("transformers>=5"),
        ) from None
    try:
        loaded: Any = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the library raises whatever its converters do
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"--tokenizer ({path}) must be a tokenizer that transformers can load ({reason}); give "
            f"a folder with {TOKENIZER_FILE}"
        ) from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise ConfigError(
            f"--tokenizer ({path}) must be one that can be converted to {TOKENIZER_FILE}, and "
            f"{type(loaded).__name__} cannot; give another form of it"
        )
    digest = hashlib.sha256()
    for file in sorted(each for each in path.iterdir() if each.is_file()):
        if file.suffix not in (".safetensors", ".bin", ".pt"):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return _given(path, backend, eod_token or loaded.eos_token, digest.hexdigest(), None)


def _from_sentencepiece(
    path: Path, content: bytes
) -> tuple[tokenizers.Tokenizer, Callable[[str], list[int]], str | None]:
    """A sentencepiece model; with the ids that it gives, and its end of a sentence."""
    try:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2 as messages
        from transformers.convert_slow_tokenizer import SpmConverter
    except ImportError:
        raise _needed(
            path,
            "a sentencepiece model, or no tokenizer; the former needs sentencepiece, protobuf and "
            "transformers",
            how_to_install("sentencepiece", "protobuf", "transformers>=5"),
        ) from None
    # protobuf makes the class when the module is imported.
    proto: Any = vars(messages)["ModelProto"]()
    try:
        proto.ParseFromString(content)
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    except Exception as error:  # protobuf's and sentencepiece's own
        raise ConfigError(
            f"--tokenizer ({path}) must be a tokenizer.json, a sentencepiece model or a file of "
            "tiktoken's ranks, and is none; check the file"
        ) from error
    kind = proto.trainer_spec.model_type
    if kind not in (1, 2):
        raise ConfigError(
            f"--tokenizer ({path}) must be a sentencepiece model of kind unigram or BPE; give its "
            f"{TOKENIZER_FILE}"
        )
    # sentencepiece finds control and byte pieces in no text; `Unigram` does unless they cost much.
    pieces = [(p.piece, p.score if p.type in _IN_TEXTS else _NEVER) for p in proto.pieces]
    vocabulary: Any = {piece: i for i, (piece, _) in enumerate(pieces)} if kind == 2 else pieces
    backend = SpmConverter.build_tokenizer_from_spm_proto(proto, vocabulary)
    # Chat templates spell them: the end of a sentence, which ends answers, among them.
    control = [piece.piece for piece in proto.pieces if piece.type == _CONTROL]
    backend.add_special_tokens([tokenizers.AddedToken(each, normalized=False) for each in control])
    eos = processor.eos_id()
    own_eod = processor.id_to_piece(eos) if eos >= 0 else None
    return backend, processor.encode, own_eod


def _read_ranks(content: bytes) -> dict[bytes, int] | None:
    """The tokens and ranks of a file of tiktoken's; None if it is none."""
    ranks = {}
    try:
        for line in content.splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error):
        return None
    return ranks or None


def _from_ranks(
    path: Path, ranks: dict[bytes, int]
) -> tuple[tokenizers.Tokenizer, Callable[[str], list[int]]]:
    """A file of tiktoken's ranks; with the ids that tiktoken gives."""
    if len(ranks) not in _ENCODINGS:
        raise ConfigError(
            f"--tokenizer ({path}) has {len(ranks)} ranks, and must have one of "
            f"{', '.join(map(str, _ENCODINGS))}, whose pattern and special tokens are known; give "
            f"its {TOKENIZER_FILE}"
        )
    pattern, special = _ENCODINGS[len(ranks)]
    try:
        import tiktoken
        from transformers.convert_slow_tokenizer import TikTokenConverter
    except ImportError:
        raise _needed(
            path,
            "a file of tiktoken's ranks, which needs tiktoken and transformers",
            how_to_install("tiktoken", "transformers>=5"),
        ) from None

    class Converter(TikTokenConverter):
        # The library's own keeps a copy by the path, and would not see that a file has changed.
        load_tiktoken_bpe = staticmethod(lambda path: ranks)

    text = PATTERNS[pattern]
    backend = Converter(str(path), pattern=text, extra_special_tokens=list(special)).converted()
    encoding = tiktoken.Encoding(path.name, pat_str=text, mergeable_ranks=ranks, special_tokens={})
    return backend, encoding.encode_ordinary
