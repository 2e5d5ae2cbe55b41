"""Means over groups of tokens: by class, token, layer.

Shape suffixes: N tokens, L MoE layers, G groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from moepp_megatron.experts import KIND_NAMES
from moepp_megatron.tools.inspection.trace import Trace


@dataclass(frozen=True)
class TokenGroup:
    """Tokens that have something in common.

    Attributes:
        name: The common property.
        ffn: FFN experts per token and layer, mean.
        ffn_error: Standard error of that mean over the tokens; NaN for fewer than two.
        kinds: Share of each of `KIND_NAMES` in the selections.
        loss: Mean loss in nats of the predicted tokens; NaN without any.
    """

    name: str
    count: int
    ffn: float
    ffn_error: float
    kinds: tuple[float, ...]
    loss: float


@dataclass(frozen=True)
class LayerSummary:
    """One MoE layer.

    Attributes:
        layer: Its number in the model, from 1.
        ffn: FFN experts per token, mean.
        counts: Share of the tokens with 0, 1, ..., K FFN experts.
        kinds: Share of each of `KIND_NAMES` in the selections.
    """

    layer: int
    ffn: float
    counts: tuple[float, ...]
    kinds: tuple[float, ...]


def groups(
    trace: Trace, keys: Sequence[Hashable], names: Sequence[str] | None = None
) -> list[TokenGroup]:
    """One group for each of N keys, in the order of first appearance.

    Tokens with the key None are left out. The first token's name, by default its key, names a
    group.
    """
    members: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        if key is not None:
            members.setdefault(key, []).append(index)
    ffn, kinds = trace.ffn_mean, trace.kind_shares
    return [
        _group(str(key) if names is None else names[rows[0]], np.asarray(rows), ffn, kinds, trace)
        for key, rows in members.items()
    ]


def all_tokens(trace: Trace) -> TokenGroup:
    """The group of all tokens."""
    rows = np.arange(len(trace.losses))
    return _group("all tokens", rows, trace.ffn_mean, trace.kind_shares, trace)


def extremes(
    trace: Trace, ids: np.ndarray, pieces: Sequence[str], length: int
) -> tuple[int, list[TokenGroup], list[TokenGroup]]:
    """Tokens with the most and with the fewest FFN experts, both with the most extreme first.

    At most `length` at each end, and never more than half; `pieces` are the texts of the tokens.
    The first result is the least number of occurrences of a token that is named.
    """
    counts = Counter(ids.tolist())
    # A rare token's mean says little; a short text has no others.
    least = next((n for n in (5, 3, 2) if sum(c >= n for c in counts.values()) >= 2 * length), 1)
    keys = [token if counts[token] >= least else None for token in ids.tolist()]
    ranked = sorted(groups(trace, keys, pieces), key=lambda group: (-group.ffn, -group.count))
    end = min(length, len(ranked) // 2)
    return least, ranked[:end], ranked[::-1][:end]


def by_layer(trace: Trace) -> list[LayerSummary]:
    """A summary of every MoE layer."""
    ffn, kinds = trace.ffn, trace.kinds
    return [
        LayerSummary(
            number,
            float(ffn[row].mean()),
            tuple(float((ffn[row] == count).mean()) for count in range(trace.topk + 1)),
            tuple(float((kinds[row] == kind).mean()) for kind in range(len(KIND_NAMES))),
        )
        for row, number in enumerate(trace.layers)
    ]


def _group(
    name: str, rows: np.ndarray, ffn: np.ndarray, kinds: np.ndarray, trace: Trace
) -> TokenGroup:
    losses = trace.losses[rows]
    known = losses[np.isfinite(losses)]
    values = ffn[rows]
    error = float(values.std(ddof=1) / len(rows) ** 0.5) if len(rows) > 1 else float("nan")
    return TokenGroup(
        name,
        len(rows),
        float(values.mean()),
        error,
        tuple(kinds[rows].mean(axis=0).tolist()),
        float(known.mean()) if len(known) else float("nan"),
    )
