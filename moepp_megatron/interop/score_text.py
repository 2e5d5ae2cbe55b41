"""Computes the perplexity of a text from its tokens, cut into windows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moepp_megatron.config import Config, ConfigError
from moepp_megatron.config.regular_file import read_text
from moepp_megatron.data.tokenizer import Tokenizer
from moepp_megatron.file_names import TOKENIZER_FILE


def text_of(path: Path, limit: int | None = None) -> tuple[str, bool]:
    """A file's characters, at most `limit` of them, and whether there are more.

    ConfigError if it cannot be read, is not UTF-8 or is empty.
    """
    # newline="": the model reads carriage returns too.
    text = read_text(path, "--text", None if limit is None else limit + 1, newline="")
    if not text:
        raise ConfigError(f"--text ({path}) must hold some text, and is empty; name another file")
    return text[:limit], limit is not None and len(text) > limit


def checkpoint_tokenizer(folder: Path, config: Config) -> Tokenizer:
    """The tokenizer that a checkpoint keeps.

    Args:
        folder: The checkpoint's folder.
        config: Its configuration.

    Raises:
        ConfigError: It has none, or one with more tokens than the model.
    """
    if not (folder / TOKENIZER_FILE).is_file():
        raise ConfigError(
            f"checkpoint ({folder}) must hold {TOKENIZER_FILE} to turn text into tokens, and the "
            "model it was converted from had none; copy the model's tokenizer.json there"
        )
    tokenizer = Tokenizer.load(folder / TOKENIZER_FILE)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"{folder / TOKENIZER_FILE} ({tokenizer.vocab_size} tokens) must not have more than "
            f"model.vocab_size ({config.model.vocab_size}) of the checkpoint; put the tokenizer "
            "there that the model was trained with"
        )
    return tokenizer


@dataclass(frozen=True)
class TextWindows:
    """A text as sequences that a model reads.

    The text is read as one document: the end of the document before comes first, so that every
    token of the text is predicted once. Each window begins with the last token of the one before
    and has no context further back.

    Attributes:
        input_ids: [b, s] int64; the last window is filled up with end-of-document tokens.
        num_tokens: Tokens of the text, N.
        num_bytes: Bytes of the text in UTF-8.
    """

    input_ids: np.ndarray
    num_tokens: int
    num_bytes: int

    @classmethod
    def read(cls, path: Path, tokenizer: Tokenizer, length: int) -> TextWindows:
        """Cut a file's text into windows of at most `length` tokens; ConfigError if it has none."""
        text, _ = text_of(path)
        ids = np.array([tokenizer.eod, *tokenizer.encode(text)], dtype=np.int64)
        count = len(ids) - 1
        if count == 0:
            raise ConfigError(f"--text ({path}) has no token; name another file")
        step = min(length, len(ids)) - 1
        if step < 1:
            raise ConfigError(
                f"model.seq_length ({length}) must be at least 2 to predict a token from another"
            )
        rows = -(-count // step)
        padded = np.full(rows * step + 1, tokenizer.eod, dtype=np.int64)
        padded[: len(ids)] = ids
        starts = step * np.arange(rows)[:, None]
        return cls(padded[starts + np.arange(step + 1)], count, len(text.encode()))

    @property
    def token_ids(self) -> np.ndarray:
        """[N] int64: the text's tokens."""
        return self.input_ids[:, 1:].reshape(-1)[: self.num_tokens]

    def token_logprobs(self, windows: np.ndarray) -> np.ndarray:
        """[N] float64 of the text's tokens, from [b, s - 1] of the windows."""
        return windows.reshape(-1)[: self.num_tokens]

    def lines(self, token_logprobs: np.ndarray) -> Iterator[str]:
        """The result in words, from [N] float64 natural logarithms."""
        rows, width = self.input_ids.shape
        loss = -float(token_logprobs.mean())
        bits = loss * self.num_tokens / self.num_bytes / math.log(2)
        yield f"text         {self.num_tokens:,} tokens in {rows:,} windows of at most {width:,}"
        yield f"loss         {loss:.4f} nats per token, {bits:.4f} bits per byte"
        # Beyond the range of a float it says nothing either.
        yield f"perplexity   {math.exp(min(loss, 700.0)):,.4g}"
