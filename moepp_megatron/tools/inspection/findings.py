"""Routing and loss of a text's tokens, means over groups of them, and all of it as JSON.

Shape suffixes: L MoE layers, N tokens, K experts selected per token.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from moepp_megatron.data.token_classes import CLASSES
from moepp_megatron.experts import KIND_NAMES
from moepp_megatron.tools.inspection.request import InspectedModel, InspectRequest

# Tokens named at each end.
_EXTREMES = 12
_FORMAT_VERSION = 2
_ALL = slice(None)


@dataclass(frozen=True)
class TokenGroup:
    """Means over `count` tokens; `name` says what they have in common.

    `ffn` is FFN experts per token and layer, `ffn_error` the standard error of that mean over the
    tokens (NaN for fewer than two), `kinds` the share of each of `KIND_NAMES` in the selections,
    `loss` that of the predicted tokens, nats (NaN without any).
    """

    name: str
    count: int
    ffn: float
    ffn_error: float
    kinds: tuple[float, ...]
    loss: float


@dataclass(frozen=True)
class Trace:
    """Routing and loss of every token.

    Attributes:
        selected: [L, N, K] int64 experts of each token, the largest gate first.
        gates: [L, N, K] fp64 their gates.
        losses: [N] fp64 negative log-probability, nats; NaN for a window's first, not predicted.
    """

    model: InspectedModel
    selected: np.ndarray
    gates: np.ndarray
    losses: np.ndarray

    @property
    def topk(self) -> int:
        """Experts selected per token, K."""
        return self.selected.shape[2]

    @cached_property
    def _kinds(self) -> np.ndarray:
        """[L, N, K] int64 kind of each selected expert, an index into `KIND_NAMES`."""
        return np.repeat(np.arange(len(KIND_NAMES)), self.model.experts.by_kind)[self.selected]

    @cached_property
    def ffn(self) -> np.ndarray:
        """[L, N] int64 FFN experts of each token."""
        return (self.selected < self.model.experts.num_ffn_experts).sum(axis=2)

    def group(self, name: str, rows: Any = _ALL, layers: slice = _ALL) -> TokenGroup:
        """Means over tokens, given by their indices, in some of the L layers."""
        ffn = self.ffn[layers][:, rows].mean(axis=0)
        kinds, losses = self._kinds[layers][:, rows], self.losses[rows]
        known = losses[np.isfinite(losses)]
        return TokenGroup(
            name,
            len(ffn),
            float(ffn.mean()),
            float(ffn.std(ddof=1) / len(ffn) ** 0.5) if len(ffn) > 1 else math.nan,
            tuple(float((kinds == kind).mean()) for kind in range(len(KIND_NAMES))),
            float(known.mean()) if len(known) else math.nan,
        )

    def groups(self, keys: Sequence[Hashable], names: Sequence[str]) -> list[TokenGroup]:
        """One group for each of N keys but None, by the name of its first token."""
        members: dict[Hashable, list[int]] = {}
        for index, key in enumerate(keys):
            if key is not None:
                members.setdefault(key, []).append(index)
        return [self.group(names[rows[0]], rows) for rows in members.values()]


@dataclass(frozen=True)
class Findings:
    """Aggregates of a trace: over all tokens, by class in the order of `CLASSES`, token and layer.

    `most_ffn` and `fewest_ffn` hold tokens that occur at least `least_count` times. Layers are
    named by their numbers in the model.
    """

    whole: TokenGroup
    by_class: list[TokenGroup]
    least_count: int
    most_ffn: list[TokenGroup]
    fewest_ffn: list[TokenGroup]
    by_layer: list[TokenGroup]

    @classmethod
    def of(cls, request: InspectRequest, trace: Trace) -> Findings:
        """All aggregates of a trace of the request's text."""
        text = request.text
        classes = [CLASSES[index] for index in request.classes.tolist()]
        by_class = sorted(trace.groups(classes, classes), key=lambda each: CLASSES.index(each.name))
        return cls(
            trace.group("all tokens"),
            by_class,
            *_extremes(trace, text.ids, text.pieces, _EXTREMES),
            [
                trace.group(str(number), layers=slice(row, row + 1))
                for row, number in enumerate(trace.model.layers)
            ],
        )


def _extremes(
    trace: Trace, ids: np.ndarray, pieces: Sequence[str], length: int
) -> tuple[int, list[TokenGroup], list[TokenGroup]]:
    """Return the least count, and up to `length` tokens with the most and fewest FFN experts."""
    counts = Counter(ids.tolist())
    # A rare token's mean says little; a short text has no others.
    least = next((n for n in (5, 3, 2) if sum(c >= n for c in counts.values()) >= 2 * length), 1)
    keys = [token if counts[token] >= least else None for token in ids.tolist()]
    ranked = sorted(trace.groups(keys, pieces), key=lambda group: (-group.ffn, -group.count))
    end = min(length, len(ranked) // 2)
    return least, ranked[:end], ranked[::-1][:end]


def to_json(request: InspectRequest, trace: Trace) -> bytes:
    """The JSON file: the text's tokens, the model's aggregates and every selection."""
    text, model = request.text, trace.model
    content = {
        "format_version": _FORMAT_VERSION,
        "text": text.name,
        "language": request.language,
        "window": request.window,
        "expert_kinds": list(KIND_NAMES),
        "notices": request.notices,
        "tokens": {
            "id": text.ids.tolist(),
            "span": text.spans.tolist(),
            "text": text.pieces,
            "class": [CLASSES[index] for index in request.classes.tolist()],
        },
        "label": model.label,
        "experts": asdict(model.experts),
        "layers": list(model.layers),
        "router_topk": trace.topk,
        "balanced_ffn_share": model.balanced_share,
        **asdict(Findings.of(request, trace)),
        # [layer][token][k], the largest gate first.
        "selected": trace.selected.tolist(),
        "gates": trace.gates.round(6).tolist(),
        # [token]; null for the first token of a window, which nothing predicts.
        "loss": trace.losses.round(6).tolist(),
    }
    return (json.dumps(_finite(content), allow_nan=False) + "\n").encode()


def _finite(value: Any) -> Any:
    """Replace numbers that are not finite by null, since JSON has no such numbers."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value
