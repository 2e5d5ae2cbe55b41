"""The series of made-up runs, for detectors of shifts: usual steps and steps of other data.

Sequences have styles, as texts have: a style moves which tokens come and which experts they want.
So steps differ by far more than independent tokens would, and some styles are rare and far off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from moepp_megatron.config.schema.routing_guard import ShiftSection
from moepp_megatron.observe.shift.losses import SourceShift
from moepp_megatron.observe.shift.routing import RoutingDetector
from moepp_megatron.observe.shift.tokens import GROUPS, TokenDetector

LAYERS, EXPERTS, TOPK, CELLS, STYLES = 4, 12, 2, 16, 6
SEQUENCES = 48
SOURCES = ("web", "books", "code")
SHARES = (0.77, 0.2, 0.03)
Chance = np.random.Generator


@dataclass
class Router:
    """What a router makes of a text: how much each expert is wanted, as log odds.

    Attributes:
        base: [L, E].
        by_cell: [L, C, E] what is added by cell.
        by_style: [L, E, styles].
        cells_by_style: [C, styles] log odds of the cells.
    """

    base: np.ndarray
    by_cell: np.ndarray
    by_style: np.ndarray
    cells_by_style: np.ndarray

    @classmethod
    def drawn(cls, seed: int) -> Router:
        chance = np.random.default_rng(seed)
        return cls(
            0.5 * chance.standard_normal((LAYERS, EXPERTS)),
            0.3 * chance.standard_normal((LAYERS, CELLS, EXPERTS)),
            0.4 * chance.standard_normal((LAYERS, EXPERTS, STYLES)),
            0.3 * chance.standard_normal((CELLS, STYLES)),
        )

    def other(self, seed: int) -> Router:
        """What it makes of another text."""
        moved = 1.5 * np.random.default_rng(seed).standard_normal((LAYERS, EXPERTS))
        return replace(self, base=self.base + moved)

    def selections(self, chance: Chance, drift: np.ndarray | float = 0.0) -> np.ndarray:
        """[L, E] of a step; `drift`, [L, E], is added to `base`."""
        # Five degrees of freedom: heavy tails.
        styles = chance.standard_t(5, size=(80, STYLES))
        cells = _softmax(styles @ self.cells_by_style.T)
        wanted = _softmax(self.base + drift + np.einsum("les,ns->nle", self.by_style, styles))
        # [L, C, E]-wise mixture of the sequences, each with its own share of the cell.
        mixed = np.einsum("nc,nle->lce", cells / cells.sum(axis=0), wanted) * np.exp(self.by_cell)
        tokens = chance.multinomial(80 * 128, cells.mean(axis=0))
        shares = mixed / mixed.sum(axis=-1, keepdims=True)
        return chance.multinomial(TOPK * tokens, shares).sum(axis=1)


def _softmax(logits: np.ndarray) -> np.ndarray:
    scores = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return scores / scores.sum(axis=-1, keepdims=True)


def routing_step(
    chance: Chance,
    router: Router,
    loss: float = 0.0,
    number: int = 10_000,
    drift: np.ndarray | float = 0.0,
    mixed: int = 0,
) -> tuple[np.ndarray, float, float]:
    """Selections, loss and its spread; so many sequences have 2.5 nats more."""
    sequences = 0.6 * chance.standard_t(5, size=SEQUENCES) + 3.0 + loss
    sequences += 4.0 * math.exp(-number / 100)
    sequences[:mixed] += 2.5
    experts = router.selections(chance, drift)
    return experts, float(sequences.mean()), float(sequences.std(ddof=1))


class TokenText:
    """A text whose sequences differ in their shares of the groups (Dirichlet-multinomial).

    Args:
        seed: Of the shares.
        alike: Concentration: how alike the sequences are.
    """

    def __init__(self, seed: int, alike: float = 100.0) -> None:
        self._alike = alike * np.random.default_rng(seed).dirichlet(np.full(GROUPS, 2.0))

    def step(self, chance: Chance, sequences: int = SEQUENCES) -> np.ndarray:
        shares = chance.dirichlet(self._alike, size=sequences)
        return chance.multinomial(64, shares).sum(axis=0).astype(np.float64)

    def mixed(self, chance: Chance, other: TokenText, share: float) -> np.ndarray:
        """Each sequence is the other text's with this probability."""
        number = int(chance.binomial(SEQUENCES, share))
        return self.step(chance, SEQUENCES - number) + other.step(chance, number)


def source_step(chance: Chance, number: int, above: dict[str, float] | None = None) -> np.ndarray:
    """[sources, 2] falling losses of sequences that differ with heavy tails, and tokens."""
    rows = []
    for name, count in zip(SOURCES, chance.multinomial(64, SHARES), strict=True):
        means = 3.0 + 4.0 * math.exp(-number / 80) + 0.5 * chance.standard_t(5, size=count)
        means += (above or {}).get(name, 0.0)
        rows.append([means.sum() * 128, float(count * 128)])
    return np.array(rows)


@dataclass(frozen=True)
class Kind:
    """A kind of series.

    Attributes:
        detector: Makes its detector.
        step: Draws the arguments of a step of a text, by its seed: 0 is the usual one.
        first_judged: The first step that can be judged.
    """

    detector: Callable[[ShiftSection], Any]
    step: Callable[[Chance, int, int], tuple[Any, ...]]
    first_judged: int

    def steps(self, seed: int, text: int = 0, first: int = 0) -> Any:
        """Steps without an end."""
        chance = np.random.default_rng([seed, text])
        while True:
            yield self.step(chance, first, text)
            first += 1

    def trained(self, seed: int, steps: int = 200, **changes: Any) -> Any:
        """A detector that has seen so many usual steps."""
        detector = self.detector(ShiftSection(**changes))
        fed(detector, self.steps(seed), steps)
        return detector


_ROUTER, _TEXT = Router.drawn(3), TokenText(103)
KINDS = {
    "routing": Kind(
        RoutingDetector,
        lambda chance, number, text: routing_step(
            chance, _ROUTER.other(text) if text else _ROUTER, float(text > 0), number
        ),
        80,
    ),
    "tokens": Kind(
        TokenDetector,
        lambda chance, number, text: ((TokenText(text) if text else _TEXT).step(chance),),
        80,
    ),
    "source": Kind(
        lambda settings: SourceShift(settings, SOURCES),
        lambda chance, number, text: (source_step(chance, number, {"books": 1.5 * (text > 0)}),),
        80,
    ),
}


def fed(detector: Any, steps: Iterable[tuple[Any, ...]], count: int | None = None) -> np.ndarray:
    """[count] evidence over its limit after each of so many steps."""
    values = []
    for step in islice(steps, count):
        detector.add(*step)
        values.append(detector.over_limit)
    return np.array(values)
