"""Classifies tokens by the characters around them, and token ids by their own and by frequency.

`TokenGroups` are the classes of token ids that metrics and rules distinguish.
"""

import io
import keyword
import re
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moepp_megatron.data.tokenizer import Tokenizer

Language = Literal["auto", "text", "python"]

CLASSES = (
    "word",
    "word, first part",
    "word, later part",
    "keyword",
    "identifier",
    "identifier, first part",
    "identifier, later part",
    "number",
    "punctuation",
    "white space",
    "part of a character",
)
"""In the order of the page. Keywords and identifiers exist in code, outside of strings and
comments; there and in prose a run of letters is a word."""

ID_CLASSES = ("word", "keyword", "number", "punctuation", "white space", "part of a character")
"""Classes of token ids by their own characters, whatever the text around: any token spelt like a
keyword is one, and names, words and their parts are words."""

_RUN = re.compile(r"\w+(?:['\u2019]\w+)*")
_CODE_RUN = re.compile(r"\w+")
_PYTHON_SUFFIXES = (".py", ".pyi")
_CODE, _PROSE = 1, 0


def language_of(path: Path, language: Language) -> Language:
    """The language, `python` or `text`: the user's choice, or by the file's name."""
    if language != "auto":
        return language
    return "python" if path.suffix in _PYTHON_SUFFIXES else "text"


def token_classes(text: str, spans: Sequence[Sequence[int]], language: Language) -> np.ndarray:
    """Return the class of each token, [N] int64 indices into `CLASSES`.

    `spans` has each token's first character in `text`, and its last character + 1, in order.
    """
    is_code = _code_mask(text) if language == "python" else np.zeros(len(text), dtype=bool)
    begins, ends = _runs(text, is_code)
    return np.asarray(
        [_class(text, int(b), int(e), is_code, begins, ends) for b, e in spans], dtype=np.int64
    )


def _id_classes(pieces: Sequence[str]) -> np.ndarray:
    """Return [V] int64 indices into `ID_CLASSES`, by the characters of each token id."""
    classes = np.empty(len(pieces), dtype=np.int64)
    for index, piece in enumerate(pieces):
        is_code = np.ones(len(piece), dtype=bool)
        end = len(piece) if piece.strip("\ufffd") else 0
        kind = CLASSES[_class(piece, 0, end, is_code, *_runs(piece, is_code))]
        classes[index] = ID_CLASSES.index(kind.partition(",")[0].replace("identifier", "word"))
    return classes


def _class(
    text: str, begin: int, end: int, is_code: np.ndarray, begins: np.ndarray, ends: np.ndarray
) -> int:
    if begin == end:
        return CLASSES.index("part of a character")
    piece = text[begin:end]
    if not piece.strip():
        return CLASSES.index("white space")
    first = begin + len(piece) - len(piece.lstrip())
    last = begin + len(piece.rstrip())
    # The first run that ends after the token's first character.
    index = int(np.searchsorted(ends, first, side="right"))
    if index == len(begins) or begins[index] >= last:
        return CLASSES.index("punctuation")
    run_begin, run_end = int(begins[index]), int(ends[index])
    run = text[run_begin:run_end]
    if run[0].isdigit():
        return CLASSES.index("number")
    in_code = bool(is_code[run_begin])
    starts, stops = first <= run_begin, last >= run_end
    if in_code and keyword.iskeyword(run):
        return CLASSES.index("keyword")
    name = "identifier" if in_code else "word"
    if starts and stops:
        return CLASSES.index(name)
    return CLASSES.index(f"{name}, first part" if starts else f"{name}, later part")


def _runs(text: str, is_code: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the text's words, names and numbers begin and end, [R] int64 each."""
    runs = []
    for match in _RUN.finditer(text):
        begin, end = match.span()
        if is_code[begin] or not is_code[begin:end].any():
            # An apostrophe joins no two names in code.
            pattern = _CODE_RUN if is_code[begin] else _RUN
            runs += [m.span() for m in pattern.finditer(text, begin, end)]
        else:
            runs += [m.span() for m in _CODE_RUN.finditer(text, begin, end)]
    table = np.asarray(runs, dtype=np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _code_mask(text: str) -> np.ndarray:
    """[characters] bool, True for code, False for strings and comments."""
    # Text that stops in the middle, or is not Python, counts as code from the point where Python's
    # tokenizer stops.
    mask = np.ones(len(text), dtype=bool)
    # As Python's tokenizer counts lines, which knows no further separators.
    starts = [0, *(match.end() for match in re.finditer(r"\n", text))]
    prose = {tokenize.COMMENT, tokenize.STRING, tokenize.FSTRING_MIDDLE}
    # Since Python 3.14.
    prose |= {getattr(tokenize, "TSTRING_MIDDLE", tokenize.STRING)}
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type in prose:
                begin, end = (starts[row - 1] + column for row, column in (token.start, token.end))
                mask[begin:end] = False
    except (tokenize.TokenError, SyntaxError):
        pass
    return mask


BAND_EDGES = (0.5, 0.8, 0.95, 0.99)
"""Shares of the training set's tokens, the most frequent ids first, at which a band ends."""


_PARTS = [f"{after - before:.0%}" for before, after in pairwise((0.0, *BAND_EDGES, 1.0))]
BANDS = (
    f"most frequent {_PARTS[0]}",
    *(f"next {part}" for part in _PARTS[1:-1]),
    f"rarest {_PARTS[-1]}",
)


@dataclass(frozen=True, eq=False)
class TokenGroups:
    """Token ids in groups, each of which is a band with a class; unions of them have names.

    Attributes:
        names: C names: of bands, and after them of the classes of `ID_CLASSES` that occur.
        of_ids: [V] int64 group of each token id.
        members: [C, G] bool groups that a name stands for.
    """

    names: tuple[str, ...]
    of_ids: NDArray[np.int64]
    members: NDArray[np.bool_]

    @classmethod
    def of(cls, bands: NDArray[np.int64], tokenizer: Tokenizer | None) -> "TokenGroups":
        """Make the groups from the band of each token id, [V] int64 indices into `BANDS`.

        The tokenizer gives the characters of ids; None where they have none.
        """
        number = len(ID_CLASSES)
        classes, occurring = np.zeros_like(bands), list[int]()
        if tokenizer is not None:
            classes = _classes_of_vocabulary(tokenizer, len(bands))
            occurring = sorted(set(classes.tolist()))
        group = np.arange(len(BANDS) * number)
        members = [group // number == band for band in range(len(BANDS))]
        members += [group % number == each for each in occurring]
        names = (*BANDS, *(ID_CLASSES[each] for each in occurring))
        return cls(names, bands * number + classes, np.asarray(members))

    @property
    def size(self) -> int:
        """Number of groups, G."""
        return self.members.shape[1]

    def ids(self, named: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """[V] bool token ids in any of the classes `named`, [C] bool."""
        return self.members[named].any(axis=0)[self.of_ids]


def _classes_of_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> NDArray[np.int64]:
    """Return [V] int64 indices into `ID_CLASSES`; the end of a document is punctuation."""
    known = set(tokenizer.vocabulary.values())
    pieces: Sequence[str] = [
        tokenizer.decode([index]) if index in known else "" for index in range(vocab_size)
    ]
    classes = _id_classes(pieces)
    classes[tokenizer.eod] = ID_CLASSES.index("punctuation")
    return classes
