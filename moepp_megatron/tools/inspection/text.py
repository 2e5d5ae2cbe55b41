"""A text as tokens with their positions, cut into windows that a model can read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moepp_megatron.config import ConfigError
from moepp_megatron.data.tokenizer import Tokenizer

# No more characters are read for a token, so that a huge file costs no more than a small one.
CHARACTERS_A_TOKEN = 64


@dataclass(frozen=True)
class TokenizedText:
    """Tokens of a text: their characters, and whether the text continues after the last token.

    Attributes:
        ids: [N] int64 token ids.
        spans: [N, 2] int64 first character, and last character + 1, of each token; in order. Empty
            if a token holds only further bytes of an earlier token's character.
    """

    name: str
    text: str
    ids: np.ndarray
    spans: np.ndarray
    is_cut: bool = False

    @classmethod
    def of(cls, tokenizer: Tokenizer, text: str, name: str, max_tokens: int) -> TokenizedText:
        """The first `max_tokens` tokens of a text; ConfigError if there are fewer than two."""
        ids, spans = tokenizer.encode_with_spans(text)
        if len(ids) < 2:
            raise ConfigError(
                f"--text ({name}, {len(ids)} tokens) must have at least 2 tokens, because the loss "
                "is that of predicting the next one; give it more text"
            )
        kept = _in_order(np.asarray(spans[:max_tokens], dtype=np.int64), text)
        known = np.asarray(ids[:max_tokens], dtype=np.int64)
        return cls(name, text[: int(kept[-1, 1])], known, kept, len(ids) > max_tokens)

    def __len__(self) -> int:
        """Number of tokens, N."""
        return len(self.ids)

    @property
    def pieces(self) -> list[str]:
        """The characters of each token."""
        return [self.text[begin:end] for begin, end in self.spans.tolist()]

    def windows(self, length: int, filler: int) -> np.ndarray:
        """[b, s] consecutive windows, s at most `length`, the last one with fillers."""
        width = min(length, len(self))
        rows = -(-len(self) // width)
        padded = np.full(rows * width, filler, dtype=np.int64)
        padded[: len(self)] = self.ids
        return padded.reshape(rows, width)


def _in_order(spans: np.ndarray, text: str) -> np.ndarray:
    """Spans without overlap (a split character is the first token's) or omitted white space."""
    fixed = spans.copy()
    previous = 0
    for index, (begin, end) in enumerate(spans.tolist()):
        begin = max(begin, previous)
        end = max(begin, end)
        if begin > previous and not text[previous:begin].strip():
            begin = previous
        fixed[index] = begin, end
        previous = end
    return fixed
