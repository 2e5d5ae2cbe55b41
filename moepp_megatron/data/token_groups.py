"""Classes of token ids that metrics and rules distinguish: by frequency, and by characters."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from moepp_megatron.data.token_classes import ID_CLASSES, id_classes
from moepp_megatron.data.tokenizer import Tokenizer

BAND_EDGES = (0.5, 0.8, 0.95, 0.99)
"""Shares of the training set's tokens, the most frequent ids first, at which a band ends."""


def _band_names() -> tuple[str, ...]:
    parts = [f"{after - before:.0%}" for before, after in pairwise((0.0, *BAND_EDGES, 1.0))]
    return (f"most frequent {parts[0]}", *(f"next {p}" for p in parts[1:-1]), f"rarest {parts[-1]}")


BANDS = _band_names()


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

    @property
    def size(self) -> int:
        """Number of groups, G."""
        return self.members.shape[1]

    def ids(self, named: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """[V] bool token ids in any of the classes `named`, [C] bool."""
        return self.members[named].any(axis=0)[self.of_ids]


def token_groups(bands: NDArray[np.int64], classes: NDArray[np.int64] | None) -> TokenGroups:
    """Make the groups.

    Args:
        bands: [V] int64 index into `BANDS` of each token id.
        classes: [V] int64 index into `ID_CLASSES`; None where ids have no characters.
    """
    number = len(ID_CLASSES)
    if classes is None:
        classes, occurring = np.zeros_like(bands), []
    else:
        occurring = sorted(set(classes.tolist()))
    group = np.arange(len(BANDS) * number)
    members = [group // number == band for band in range(len(BANDS))]
    members += [group % number == each for each in occurring]
    names = (*BANDS, *(ID_CLASSES[each] for each in occurring))
    return TokenGroups(names, bands * number + classes, np.asarray(members))


def classes_of_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> NDArray[np.int64]:
    """[V] int64 index into `ID_CLASSES` of each token id.

    The end of a document counts as punctuation; ids that the tokenizer does not have are in no
    text.
    """
    known = set(tokenizer.vocabulary.values())
    pieces: Sequence[str] = [
        tokenizer.decode([index]) if index in known else "" for index in range(vocab_size)
    ]
    classes = id_classes(pieces)
    classes[tokenizer.eod] = ID_CLASSES.index("punctuation")
    return classes
