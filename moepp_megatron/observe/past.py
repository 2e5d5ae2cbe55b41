"""What was usual before: running means that rules of the routing guard compare a step with.

The same numbers give the same state on every machine, because products and sums are single
operations of NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moepp_megatron.observe.guard_judge import Values

Numbers = NDArray[np.float64]

# Of layers: half-lives in steps of what is usual and of what is far from it, from which share of
# it a value is far, and the steps before which nothing is compared.
_OF_LAYERS, _FAR, _FEWEST, _FEWEST_OF_PLATEAU = (15.0, 400.0), 0.7, 40, 200
# The same of classes, and the half-life of what counts as now. A class that training changes slowly
# is followed at the usual pace as long as it has more than half of what it had.
_NOW, _OF_CLASSES, _FALLEN, FEWEST_OF_CLASSES = 5.0, (30.0, 1000.0), 0.5, 100
# Classes are not compared where fewer tokens or FFN experts were to be expected now: independent
# tokens then give a standard deviation of a tenth at most.
FEWEST_TOKENS, FEWEST_EXPECTED = 100.0, 100.0


class Usual:
    """Running means that learn slowly from what is far from them.

    Otherwise a fallen value would soon be compared with its fall. It is learnt at all, so that one
    that has settled elsewhere for good becomes usual.

    Args:
        shape: The numbers' shape.
        half_lives: Half-lives in steps, of what is usual and of what is far from it.
        mean: Means from a checkpoint, None or NaN where nothing is known; ignored if they have
            another shape.

    Attributes:
        mean: The means; NaN where nothing is known.
    """

    def __init__(self, shape: tuple[int, ...], half_lives: tuple[float, float], mean: Any) -> None:
        self.mean: Numbers = np.full(shape, np.nan)
        self._usual, self._far = map(_keep, half_lives)
        if np.shape(mean) == shape:
            self.mean = np.asarray(mean, dtype=np.float64)

    def state(self) -> list[Any]:
        """The means for a checkpoint, None for NaN: saving compares ranks, and NaN is not equal."""
        mean = self.mean.astype(object)
        mean[np.isnan(self.mean)] = None
        return list(mean.tolist())

    def learn(self, values: Numbers, step: int, is_far: Any, is_counted: Any = True) -> None:
        """Learn from a step, counted from 1; not from values that are not finite or not counted."""
        # At first the plain mean, which no step outweighs.
        keep = np.where(is_far, self._far, min(self._usual, 1.0 - 1.0 / step))
        learnt = np.where(np.isnan(self.mean), values, keep * self.mean + (1.0 - keep) * values)
        self.mean = np.where(np.isfinite(values) & is_counted, learnt, self.mean)


class Past:
    """What FFN shares, gradient norm and loss were.

    Args:
        num_layers: MoE layers.
        state: Result of an earlier `state()`; one of another number of layers is ignored.
    """

    def __init__(self, num_layers: int, state: Mapping[str, Any] | None = None) -> None:
        shape, mean = (num_layers + 2,), _mean_of(state)
        if state is None or np.shape(mean) != shape:
            state = {"count": 0, "lowest": None, "lowest_at": 0}
        self._count, self._usual = state["count"], Usual(shape, _OF_LAYERS, mean)
        lowest, self._lowest_at = state["lowest"], state["lowest_at"]
        self._lowest = math.nan if lowest is None else lowest

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, which later steps do not change."""
        return {
            "count": self._count,
            "mean": self._usual.state(),
            "lowest": None if math.isnan(self._lowest) else self._lowest,
            "lowest_at": self._lowest_at,
        }

    def add(self, shares: Sequence[float], grad_norm: float, loss: float) -> Values:
        """Compare a step with what was usual, then learn from it.

        Args:
            shares: FFN share of each MoE layer.
            grad_norm: Gradient norm before clipping; NaN where it is not the model's.
            loss: Language-model loss in nats; NaN likewise.

        Returns:
            The metrics `ffn_to_past`, `grad_norm_to_past` and `loss_plateau`; NaN where there is
            too little to compare with.
        """
        self._count += 1
        values = np.array([*shares, grad_norm, loss])
        ratios = _over(values, self._usual.mean)
        # Shares fall, gradient norms grow, and a loss is what it is.
        is_far = [*(ratios[:-2] < _FAR), ratios[-2] > 1.0 / _FAR, False]
        self._usual.learn(values, self._count, is_far)
        *to_past, grad_norm_to_past, _ = ratios.tolist()
        if self._count <= _FEWEST:
            to_past, grad_norm_to_past = [math.nan] * len(to_past), math.nan
        return {
            "ffn_to_past": to_past,
            "grad_norm_to_past": grad_norm_to_past,
            "loss_plateau": self._plateau(float(self._usual.mean[-1])),
        }

    def _plateau(self, loss: float) -> float:
        if not loss >= self._lowest:
            self._lowest, self._lowest_at = loss, self._count
        if self._count < _FEWEST_OF_PLATEAU:
            return math.nan
        return (self._count - self._lowest_at) / self._count


class ClassPast:
    """What each class of tokens had of FFN experts, by layer.

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
        # Of now: FFN experts and tokens, those of all tokens behind the classes'. Before: FFN
        # experts per token, and these over the layer's mean.
        shape, mean = (num_layers, num_classes, 2), _mean_of(state)
        if state is None or np.shape(mean) != shape:
            state = {"steps": 0, "now": np.zeros((num_layers, num_classes + 1, 2))}
        self._steps, self._now = state["steps"], np.asarray(state["now"], dtype=np.float64)
        self._before = Usual(shape, _OF_CLASSES, mean)

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, which later steps do not change."""
        now, mean = self._now.tolist(), self._before.state()
        return {"steps": self._steps, "now": now, "mean": mean}

    def add(self, counts: NDArray[np.int64]) -> Numbers:
        """Compare a step with what was before, then learn from it.

        Args:
            counts: [L, C + 1, 2] FFN experts that the routers want, and tokens, of each class, and
                behind them of all tokens.

        Returns:
            [L, C] what is left: 1 is as before; NaN where there is too little to compare.
        """
        self._steps += 1
        self._now = _keep(_NOW) * self._now + counts
        per_token = _over(self._now[..., 0], self._now[..., 1])
        own, layer = per_token[:, :-1], per_token[:, -1:]
        now = np.stack([own, _over(own, layer)], axis=-1)
        left = _over(now, self._before.mean).max(axis=-1)
        tokens = self._now[:, :-1, 1]
        is_known = self._before.mean[..., 0] * tokens >= FEWEST_EXPECTED
        left = np.where(is_known & (self._steps > FEWEST_OF_CLASSES), left, np.nan)
        is_counted = (tokens >= FEWEST_TOKENS)[..., None]
        self._before.learn(now, self._steps, (left < _FALLEN)[..., None], is_counted)
        return left

    def ffn_per_token(self) -> tuple[Numbers, Numbers]:
        """[L, C] FFN experts per token before, and now."""
        now = _over(self._now[..., 0], self._now[..., 1])
        return self._before.mean[..., 0], now[:, :-1]


def _mean_of(state: Mapping[str, Any] | None) -> Any:
    """The means of a checkpoint; None where it has none, as before they had one form."""
    return None if state is None else state.get("mean")


def _keep(half_life: float) -> float:
    """Weight of the past, a step."""
    return float(0.5 ** (1.0 / half_life))


def _over(part: Numbers, whole: Numbers) -> Numbers:
    """`part / whole`, NaN where `whole` is 0."""
    part, whole = np.broadcast_arrays(part, whole)
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole != 0)
