"""The order of documents in a corpus, and which of them are for validation."""

import numpy as np
from numpy.typing import NDArray

VALIDATION_SHARE = 0.05
# Of a document that belongs to no group.
ALONE = -1


def arrange(
    groups: NDArray[np.int64], lengths: NDArray[np.int64], seed: int
) -> tuple[NDArray[np.int64], int | None]:
    """Shuffle documents; those for validation, whole groups, come last.

    megatron-core splits by position, so the number of documents at the end is the split. Groups are
    drawn in a random order, and each that fits is taken until `VALIDATION_SHARE` of the tokens is
    reached. A document of no group is one by itself.

    Args:
        groups: [documents] number of each document's group, or `ALONE`.
        lengths: [documents] tokens.
        seed: Seed of the order.

    Returns:
        The documents in order, and how many at the end are for validation: None if there are no
        groups, where any split will do, or only one.
    """
    # RandomState, because NumPy promises its stream across versions; default_rng's may change.
    random = np.random.RandomState(seed)
    order = random.permutation(len(lengths)).astype(np.int64)
    if (groups == ALONE).all():
        return order, None
    own = np.arange(len(groups)) + groups.max() + 1
    _, units = np.unique(np.where(groups == ALONE, own, groups), return_inverse=True)
    tokens = np.bincount(units, weights=lengths).astype(np.int64)
    if len(tokens) < 2:
        return order, None
    left = int(VALIDATION_SHARE * tokens.sum())
    # If not even the smallest fits, it is taken all the same.
    chosen = np.zeros(len(tokens), dtype=bool)
    for unit in random.permutation(len(tokens)):
        if tokens[unit] <= left:
            chosen[unit] = True
            left -= int(tokens[unit])
    if not chosen.any():
        chosen[tokens.argmin()] = True
    is_validation = chosen[units[order]]
    return np.concatenate([order[~is_validation], order[is_validation]]), int(is_validation.sum())
