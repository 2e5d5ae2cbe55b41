"""Cuts long texts where a tokenizer's pre-tokenizer splits them anyway.

A tokenizer needs some 160 bytes of memory per byte of a text that it gets in one call. Encoded in
pieces a long text takes little, and gives the same tokens if no pre-token crosses a cut. Whether
one can is known for the patterns below and no others.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import tokenizers

PIECE_CHARACTERS = 64 * 1024
MAX_PIECE_CHARACTERS = 16 * 1024 * 1024
"""Longer text that cannot be cut is not encoded: it would take 165 bytes of memory per byte."""


class UncuttableError(ValueError):
    """A text that cannot be cut is too long to be encoded."""


# Cuts that no pre-token of the patterns below crosses: each match is an optional leading character
# and then characters of one class (letters, digits, others, white space), some with line ends
# after. Matching has no memory, so the text behind a cut is matched as if nothing were before it.
_CUT = re.compile(
    # Any character before a space or a tab.
    r"(?<=\S)(?=[ \t])"
    # A letter or digit before a line end. Outside of the basic plane the tokenizer's Unicode tables
    # may be older than ours, and what is a letter here may be another character there.
    r"|(?<=[^\W_\U00010000-\U0010ffff])(?=[\r\n])"
    # A letter before a digit and a digit before a letter, for long texts without white space.
    r"|(?<=[A-Za-z])(?=[0-9])|(?<=[0-9])(?=[A-Za-z])"
    # Chinese, Japanese or Korean letters before full-width punctuation.
    r"|(?<=[\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3])(?=[\u3001\u3002\uff01\uff0c\uff1f])"
)
# What is matched at a time when looking for the last cut before a limit.
_WINDOW = 512

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    # What `ByteLevel(use_regex=True)` does by itself.
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # Llama 3's, too.
    "cl100k": _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    + _SPACES,
    # Qwen3's, too.
    "qwen2": _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    + _SPACES,
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    + _CONTRACTIONS
    + r"?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    + _CONTRACTIONS
    + r"?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
    + _SPACES,
    # DeepSeek-V3's, with the two patterns below before it.
    "deepseek": r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES,
}
"""Patterns of byte-level tokenizers by name. A tokenizer whose texts may be cut has one of them."""
_SPLITTING = frozenset(PATTERNS.values())
# Patterns that may be there too: they split between classes of characters.
_OTHER_PATTERNS = frozenset({r"\p{N}{1,3}", r"\p{N}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"})


def cut_text(text: str, limit: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Yield pieces of a text for a tokenizer that `can_cut`; joined they are the text.

    A piece has at most `limit` characters; one without a place to cut is longer, up to the next
    such place. An empty text has no pieces.
    """
    start = 0
    while len(text) - start > limit:
        cut = _last_cut(text, start, start + limit) or _next_cut(text, start + limit)
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]


def _last_cut(text: str, start: int, end: int) -> int | None:
    """The last place in (start, end] where the text may be cut."""
    while end > start:
        begin = max(end - _WINDOW, start)
        last = None
        # One character more, which the pattern looks ahead to. The look behind sees all of `text`.
        for match in _CUT.finditer(text, max(begin, start + 1), min(end + 1, len(text))):
            if match.start() <= end:
                last = match.start()
        if last is not None:
            return last
        end = begin
    return None


def _next_cut(text: str, start: int) -> int:
    match = _CUT.search(text, start)
    return len(text) if match is None else match.start()


def can_cut(backend: tokenizers.Tokenizer) -> bool:
    """True if a tokenizer gives the pieces of `cut_text` the tokens of the whole text.

    True is certain. False is not: pre-tokenizers that are not known here may be suitable too.
    """
    normalizer = _state(backend.normalizer)
    # Composition acts within what is between two cuts.
    is_local = (
        normalizer is None or normalizer["type"] == "NFC" or normalizer.get("normalizers") == []
    )
    return is_local and _splits_at_cuts(_state(backend.pre_tokenizer)) and _added_fit(backend)


def _state(component: Any) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer as tokenizer.json describes it."""
    if component is None:
        return None
    state: dict[str, Any] = json.loads(component.__getstate__())
    return state


def _splits_at_cuts(description: dict[str, Any] | None) -> bool:
    if description is None:
        return False
    is_sequence = description["type"] == "Sequence"
    steps = description["pretokenizers"] if is_sequence else [description]
    kinds = [_kind(step) for step in steps]
    return "unknown" not in kinds and "splits" in kinds


def _kind(step: dict[str, Any]) -> str:
    """Tell if a step splits at every cut, is compatible, or is unknown."""
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return "splits" if step["use_regex"] else "fits"
    if step["type"] == "Digits":
        return "fits"
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        # Files spell line ends as escapes or as themselves.
        pattern = step["pattern"].get("Regex", "").replace("\r", r"\r").replace("\n", r"\n")
        if pattern in _SPLITTING:
            return "splits"
        if pattern in _OTHER_PATTERNS:
            return "fits"
    return "unknown"


def _added_fit(backend: tokenizers.Tokenizer) -> bool:
    """True if tokens matched before the pre-tokenizer cannot match across a cut."""
    # Special tokens are not matched at all: `Tokenizer` encodes their names as text.
    return not any(
        token.rstrip or token.single_word or _CUT.search(token.content)
        for token in backend.get_added_tokens_decoder().values()
        if not token.special
    )
