"""What each class of tokens had of FFN experts before, and what is left of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

# Half-lives in steps: of what counts as now, of what was before, and of that where it has fallen
# below `_FALLEN` of it: a class would else soon be compared with its fall, and one that has settled
# elsewhere for good would never become usual. Above it a class that training changes slowly is
# followed at the usual pace.
_NOW, _BEFORE, _BEFORE_FALLEN = 5.0, 30.0, 1000.0
_FALLEN = 0.5
# Nothing is compared before so many steps, or where fewer FFN experts were to be expected now:
# independent tokens then give a standard deviation of a tenth at most.
_FEWEST_STEPS, _FEWEST_TOKENS, _FEWEST_EXPECTED = 100, 100.0, 100.0


class ClassPast:
    """Running means by layer and class. The same numbers give the same state on every machine.

    A class is compared with itself before in two ways: its FFN experts per token, and their ratio
    to the layer's mean. The larger result counts, so that a class that falls with its whole layer,
    which other rules see, and one that stays while the others rise have not fallen.

    Args:
        num_layers: MoE layers.
        num_classes: Classes of tokens.
        state: Result of an earlier `state()`; one of other numbers is ignored.
    """

    def __init__(
        self, num_layers: int, num_classes: int, state: Mapping[str, Any] | None = None
    ) -> None:
        self._steps = 0
        # Of now: FFN experts and tokens, those of all tokens behind the classes'. Before: FFN
        # experts per token, and these over the layer's mean.
        self._now = np.zeros((num_layers, num_classes + 1, 2))
        self._before = np.full((num_layers, num_classes, 2), np.nan)
        if state is not None and np.shape(state["now"]) == self._now.shape:
            self._steps = state["steps"]
            self._now = np.asarray(state["now"], dtype=np.float64)
            before = np.asarray(state["before"], dtype=np.float64)
            self._before = np.where(before < 0.0, np.nan, before)

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, as JSON, which later steps do not change."""
        before = np.where(np.isnan(self._before), -1.0, self._before)
        return {"steps": self._steps, "now": self._now.tolist(), "before": before.tolist()}

    def add(self, counts: NDArray[np.int64]) -> Values:
        """Compare a step with what was before, then learn from it.

        Args:
            counts: [L, C + 1, 2] FFN experts that the routers want, and tokens, of each class, and
                behind them of all tokens.

        Returns:
            [L, C] what is left: 1 is as before; NaN where there is too little to compare.
        """
        self._steps += 1
        # Products and sums are single operations of NumPy, which all machines round alike.
        self._now = _keep(_NOW) * self._now + counts
        per_token = _over(self._now[..., 0], self._now[..., 1])
        own, layer = per_token[:, :-1], per_token[:, -1:]
        now = np.stack([own, _over(own, layer)], axis=-1)
        left = _over(now, self._before).max(axis=-1)
        tokens = self._now[:, :-1, 1]
        left = np.where(self._before[..., 0] * tokens >= _FEWEST_EXPECTED, left, np.nan)
        self._learn(now, left, tokens >= _FEWEST_TOKENS)
        return left if self._steps > _FEWEST_STEPS else np.full_like(left, np.nan)

    def ffn_per_token(self) -> tuple[Values, Values]:
        """[L, C] FFN experts per token before, and now."""
        now = _over(self._now[..., 0], self._now[..., 1])
        return self._before[..., 0], now[:, :-1]

    def _learn(self, now: Values, left: Values, is_counted: NDArray[np.bool_]) -> None:
        has_fallen = (left < _FALLEN) & (self._steps > _FEWEST_STEPS)
        # At first the plain mean, which no step outweighs.
        usual = min(_keep(_BEFORE), 1.0 - 1.0 / self._steps)
        keep = np.where(has_fallen, _keep(_BEFORE_FALLEN), usual)[..., None]
        learnt = keep * self._before + (1.0 - keep) * now
        learnt = np.where(np.isnan(self._before), now, learnt)
        self._before = np.where(is_counted[..., None], learnt, self._before)


def _keep(half_life: float) -> float:
    """Weight of the past, a step."""
    return float(0.5 ** (1.0 / half_life))


def _over(part: Values, whole: Values) -> Values:
    """`part / whole`, NaN where `whole` is 0."""
    part, whole = np.broadcast_arrays(part, whole)
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole != 0)
