"""Classes of tokens whose FFN experts a router has taken away."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moepp_megatron.data.token_groups import BANDS
from moepp_megatron.observe.past import ClassPast
from moepp_megatron.training.parts.token_groups import TOKENS, WANTED, GroupCollector

METRIC = "class_ffn_to_past"


class FallenClasses:
    """Compares each class of tokens with its past.

    All ranks have the same numbers, because counts are whole.

    Args:
        collector: Counts by class.
        layer_numbers: Global numbers of the MoE layers.
        state: Result of an earlier `state()`; one of other classes is ignored.
    """

    def __init__(
        self,
        collector: GroupCollector,
        layer_numbers: Sequence[int],
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self._collector, self._layers = collector, list(layer_numbers)
        self._names = list(collector.groups.names)
        if state is not None and state["names"] != self._names:
            state = None
        past = None if state is None else state["past"]
        self._past = ClassPast(len(self._layers), len(self._names), past)
        self._left = np.full((len(self._layers), len(self._names)), np.nan)

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, which later steps do not change."""
        return {"names": list(self._names), "past": self._past.state()}

    def end_step(self) -> list[float]:
        """Learn from the step; a collective, unless its counts are known.

        Returns:
            The metric: for each layer what is left to the class that lost most; NaN where nothing
            is to be compared.
        """
        counts = self._collector.counts()[..., [WANTED, TOKENS]]
        # Every token is in one band.
        everything = counts[:, : len(BANDS)].sum(axis=1, keepdims=True)
        self._left = self._past.add(np.concatenate([counts, everything], axis=1))
        lost_most = np.where(np.isnan(self._left), np.inf, self._left).min(axis=1)
        return [left if math.isfinite(left) else math.nan for left in lost_most.tolist()]

    def note(self, layer: int, limit: float) -> str:
        """What fell, in words, in a layer or the whole model."""
        before, now = self._past.ffn_per_token()
        rows = [self._layers.index(layer)] if layer in self._layers else range(len(self._layers))
        parts = [
            f"FFN experts of {self._names[each]} tokens {before[row, each]:.2f} -> "
            f"{now[row, each]:.2f}"
            for row in rows
            for each in np.flatnonzero(self._left[row] < limit)
        ]
        return ", ".join(parts[:3])
