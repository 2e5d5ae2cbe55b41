"""Expert usages drawn from a made-up text and router, by the window.

Sequences have styles, as texts have: a style moves which tokens come and which experts they want.
So windows differ by far more than independent tokens would, and some styles are rare and far off.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from moepp_megatron.observe.expert_usage import ExpertUsage

LAYERS, FFN, OTHERS, TOPK = 4, 8, 4, 2
EXPERTS, POSITIONS, CLASSES = FFN + OTHERS, 4, 4
SEQUENCES, LENGTH, STYLES = 80, 128, 6


@dataclass
class Router:
    """How much each expert is wanted, as log odds.

    Attributes:
        base: [L, E].
        by_cell: [L, C, E] what is added by cell.
        by_style: [L, E, styles].
        classes_by_style: [classes, styles] log odds of the classes of tokens.
    """

    base: np.ndarray
    by_cell: np.ndarray
    by_style: np.ndarray
    classes_by_style: np.ndarray
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(CLASSES))

    @classmethod
    def drawn(cls, chance: np.random.Generator) -> Router:
        return cls(
            0.5 * chance.standard_normal((LAYERS, EXPERTS)),
            0.3 * chance.standard_normal((LAYERS, POSITIONS * CLASSES, EXPERTS)),
            0.4 * chance.standard_normal((LAYERS, EXPERTS, STYLES)),
            0.3 * chance.standard_normal((CLASSES, STYLES)),
        )

    def window(self, chance: np.random.Generator, drift: np.ndarray | float = 0.0) -> ExpertUsage:
        """One window's usage; `drift`, [L, E], is added to `base`."""
        # Five degrees of freedom: heavy tails.
        styles = chance.standard_t(5, size=(SEQUENCES, STYLES))
        classes = _softmax(self.tokens + styles @ self.classes_by_style.T)
        wanted = _softmax(self.base + drift + np.einsum("les,ns->nle", self.by_style, styles))
        # [C, E]-wise mixture of the sequences, each with its own share of the cell.
        weights = np.tile(classes / POSITIONS, POSITIONS)
        mixed = np.einsum("nc,nle->lce", weights / weights.sum(axis=0), wanted)
        shares = mixed * np.exp(self.by_cell)
        shares /= shares.sum(axis=-1, keepdims=True)
        tokens = chance.multinomial(SEQUENCES * LENGTH, weights.mean(axis=0))
        selections = chance.multinomial(
            TOPK * np.broadcast_to(tokens, (LAYERS, len(tokens))), shares
        )
        ffn = selections[..., :FFN].sum(axis=-1)
        cells = np.stack([ffn, np.broadcast_to(tokens, ffn.shape)], axis=-1)
        return ExpertUsage(selections.sum(axis=1), cells)


def _softmax(logits: np.ndarray) -> np.ndarray:
    scores = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return scores / scores.sum(axis=-1, keepdims=True)
