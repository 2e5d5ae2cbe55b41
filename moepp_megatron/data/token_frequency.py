"""Classes of token ids by how frequent they are in the training set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moepp_megatron.data.token_check import check_tokens

# Checked and counted together, since a call a sample adds up where samples are short.
_TOKENS_AT_ONCE = 1 << 16
# About as many tokens are read.
_TOKENS = 1 << 21


def token_counts(dataset: Any, vocab_size: int) -> NDArray[np.int64]:
    """Count each token id in evenly spaced samples.

    Args:
        dataset: Its samples have `tokens`, [sequence length] int64.
        vocab_size: Size of the vocabulary; all ids are smaller.

    Returns:
        [vocab_size] int64.

    Raises:
        ConfigError: If a token is outside the vocabulary (`check_tokens`).
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    length = len(dataset[0]["tokens"])
    wanted = min(len(dataset), max(1, _TOKENS // length))
    indices = np.linspace(0, len(dataset) - 1, wanted, dtype=np.int64).tolist()
    at_once = max(1, _TOKENS_AT_ONCE // length)
    for begin in range(0, wanted, at_once):
        part = indices[begin : begin + at_once]
        tokens = torch.stack([dataset[index]["tokens"] for index in part])
        check_tokens(dataset, part, {"tokens": tokens}, vocab_size)
        counts += np.bincount(tokens.flatten().numpy(), minlength=vocab_size)
    return counts


def frequency_bands(counts: NDArray[np.int64], edges: Sequence[float]) -> NDArray[np.int64]:
    """Sort token ids into classes that hold given shares of the tokens.

    Args:
        counts: [V] int64 occurrences of each id.
        edges: Share of the tokens up to the end of each class but the last, rising.

    Returns:
        [V] int64 class of each id, 0 for the most frequent. Ids that do not occur are in the last.
    """
    # Stable, so that ids of one count are in one order everywhere.
    order = np.argsort(-counts, kind="stable")
    ordered = counts[order]
    # The middle of each id's own tokens: an id with more tokens than a class holds fills classes.
    middle = np.cumsum(ordered) - ordered / 2
    classes = np.empty(len(counts), dtype=np.int64)
    limits = np.asarray(edges, dtype=np.float64) * int(counts.sum())
    classes[order] = np.searchsorted(limits, middle, side="right")
    classes[counts == 0] = len(edges)
    return classes
