"""Checks that a tokenizer is the one whose token ids a corpus or a model uses.

Two tokenizers of equal size number different texts: a model trained on one and prompted through the
other answers nonsense, and nothing fails.
"""

import hashlib
from pathlib import Path

from moepp_megatron.config import Config, ConfigError
from moepp_megatron.config.blends import Folder, blends_of
from moepp_megatron.config.regular_file import check_regular
from moepp_megatron.data.manifest import Manifest
from moepp_megatron.data.tokenizer import Tokenizer, named_eod_token, tokenizer_file
from moepp_megatron.file_names import TOKENIZER_FILE

_SHOWN = 16


def tokenizer_of_run(config: Config) -> Path:
    """The `tokenizer.json` of a run: `data.tokenizer`, or the one in the first data folder."""
    blends = blends_of(config)
    path = config.data.tokenizer or (blends[0].folders[0].path if blends else None)
    assert path is not None, "training needs data.path"
    return tokenizer_file(path)


def check_corpus_tokenizer(config: Config, manifest: Manifest, folder: Folder) -> None:
    """Refuse a tokenizer that is not that of a folder, or ends documents with another token.

    The same tokenizer in another notation is accepted.

    Raises:
        ConfigError: If it is another tokenizer, is not a tokenizer, or cannot be read.
    """
    file, own = tokenizer_of_run(config), folder.path / TOKENIZER_FILE
    digest = _sha256(file)
    is_same = digest == manifest.tokenizer_sha256 or (
        own.is_file()
        and _sha256(own) == manifest.tokenizer_sha256
        and _content(file) == _content(own)
    )
    if is_same:
        _check_end_of_document(file, manifest, folder)
        return
    of_corpus = f"SHA-256 {manifest.tokenizer_sha256[:_SHOWN]}... in its manifest"
    if file == own:
        raise ConfigError(
            f"{folder} must hold the {TOKENIZER_FILE} that its text was "
            f"tokenized with ({of_corpus}), and holds another (SHA-256 {digest[:_SHOWN]}...); put "
            "that one back, or prepare the text again"
        )
    if config.data.tokenizer is None:
        raise ConfigError(
            f"{folder.name} ({folder.path}, {of_corpus}) must be tokenized with the tokenizer of "
            f"the first folder ({file}, SHA-256 {digest[:_SHOWN]}...); prepare its text again with "
            f"--tokenizer {file}, or leave it out"
        )
    raise ConfigError(
        f"data.tokenizer ({file}, SHA-256 {digest[:_SHOWN]}...) must be the one that {folder} was "
        f"tokenized with ({of_corpus}); leave data.tokenizer out, or "
        f"prepare the text again with --tokenizer {file}"
    )


def _check_end_of_document(file: Path, manifest: Manifest, folder: Folder) -> None:
    """Masks, generation and metrics look for one token, whichever folder a sample is of."""
    eod_token = named_eod_token(file) or Tokenizer.load(file).eod_token
    if eod_token != manifest.eod_token:
        raise ConfigError(
            f"{folder} must end documents with {eod_token}, the "
            f"end-of-document token of {file}, and ends them with {manifest.eod_token}; prepare "
            f"its text again with --eod-token '{eod_token}', or name another tokenizer or folder"
        )


def check_model_tokenizer(config: Config, trained: Path) -> None:
    """Refuse data whose token ids mean other tokens than those that a model was trained on.

    Raises:
        ConfigError: If the ids mean other tokens, or the run's tokenizer cannot be read.
    """
    blends = blends_of(config)
    if not blends or not trained.is_file():
        return
    file = tokenizer_of_run(config)
    here, there = _sha256(file), _sha256(trained)
    if here == there:
        return
    try:
        wanted = _vocabulary(trained)
    except ConfigError:
        return
    if _vocabulary(file) != wanted:
        raise ConfigError(
            f"{blends[0].name} ({blends[0].text}) has a tokenizer ({file}, SHA-256 "
            f"{here[:_SHOWN]}...) whose ids must mean the tokens that {trained.parent} was "
            f"trained on ({TOKENIZER_FILE} there: SHA-256 {there[:_SHOWN]}...); prepare the text "
            f"again with --tokenizer {trained}, or start from another checkpoint"
        )


def _sha256(path: Path) -> str:
    try:
        check_regular(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(
            f"tokenizer ({path}) cannot be read ({error.strerror}); name another data.tokenizer, "
            "or prepare the text again"
        ) from error


def _content(path: Path) -> str:
    return Tokenizer.load(path).unique_identifiers["sha256"]


def _vocabulary(path: Path) -> dict[str, int]:
    return Tokenizer.load(path).vocabulary
