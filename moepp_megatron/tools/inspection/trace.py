"""Routing and loss of a model for each token of a text.

Shape suffixes: L MoE layers, N tokens, K experts selected per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moepp_megatron.experts import KIND_NAMES, ExpertCounts


@dataclass(frozen=True)
class Trace:
    """Routing and loss of every token.

    Attributes:
        experts: Experts of one MoE layer, by kind.
        layers: L numbers of the transformer layers that are MoE layers, from 1.
        balanced_share: FFN share of all selections under perfect balance.
        selected: [L, N, K] int64 experts of each token, the largest gate first.
        gates: [L, N, K] fp64 their gates.
        losses: [N] fp64 negative log-probability of each token, in nats; NaN for the first of a
            window, which is not predicted.
    """

    label: str
    facts: tuple[str, ...]
    experts: ExpertCounts
    layers: tuple[int, ...]
    balanced_share: float
    selected: np.ndarray
    gates: np.ndarray
    losses: np.ndarray

    @property
    def topk(self) -> int:
        """Experts selected per token, K."""
        return self.selected.shape[2]

    @property
    def kinds(self) -> np.ndarray:
        """[L, N, K] int64 kind of each selected expert, an index into `KIND_NAMES`."""
        sizes = self.experts.by_kind
        of_expert = np.repeat(np.arange(len(KIND_NAMES)), sizes)
        return of_expert[self.selected]

    @property
    def ffn(self) -> np.ndarray:
        """[L, N] int64 FFN experts of each token."""
        return (self.selected < self.experts.num_ffn_experts).sum(axis=2)

    @property
    def ffn_mean(self) -> np.ndarray:
        """[N] fp64 FFN experts of each token, mean over the MoE layers."""
        return self.ffn.mean(axis=0)

    @property
    def kind_shares(self) -> np.ndarray:
        """[N, 4] fp64 share of each kind in a token's selections of all layers."""
        kinds = self.kinds
        return np.stack([(kinds == kind).mean(axis=(0, 2)) for kind in range(len(KIND_NAMES))], 1)
