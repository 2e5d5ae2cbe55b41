"""What was usual before: running means that rules of the routing guard compare a step with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from moepp_megatron.observe.guard_judge import Values

# Half-lives in steps: of what is usual, of what has fallen below this share of it, and of the loss.
_HALF_LIFE = 15.0
_FALLEN, _FALLEN_HALF_LIFE = 0.7, 400.0
_LOSS_HALF_LIFE = 15.0
# Nothing is compared before so many steps.
_FEWEST = 40
_FEWEST_OF_PLATEAU = 200


class Past:
    """Running means of FFN shares, gradient norm and loss. The same numbers give the same state.

    A share or gradient norm that is far from what was usual is learnt slowly: otherwise a fallen
    layer would soon be compared with its fall. It is learnt at all, so that a router that has
    settled elsewhere for good becomes usual.

    Args:
        num_layers: MoE layers.
        state: Result of an earlier `state()`; one of another number of layers is ignored.
    """

    def __init__(self, num_layers: int, state: Mapping[str, Any] | None = None) -> None:
        self._count = 0
        self._shares = [math.nan] * num_layers
        self._grad_norm = self._loss = self._lowest = math.nan
        self._lowest_at = 0
        if state is not None and len(state["shares"]) == num_layers:
            self._count, self._shares = state["count"], list(state["shares"])
            self._grad_norm, self._loss = state["grad_norm"], state["loss"]
            self._lowest, self._lowest_at = state["lowest"], state["lowest_at"]

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, which later steps do not change."""
        return {
            "count": self._count,
            "shares": list(self._shares),
            "grad_norm": self._grad_norm,
            "loss": self._loss,
            "lowest": self._lowest,
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
        known = self._count > _FEWEST
        found: dict[str, float | list[float]] = {
            "ffn_to_past": [
                _ratio(share, mean) if known else math.nan
                for share, mean in zip(shares, self._shares, strict=True)
            ],
            "grad_norm_to_past": _ratio(grad_norm, self._grad_norm) if known else math.nan,
        }
        self._shares = [
            _learnt(mean, share, is_far=share < _FALLEN * mean)
            for share, mean in zip(shares, self._shares, strict=True)
        ]
        is_far = grad_norm * _FALLEN > self._grad_norm
        self._grad_norm = _learnt(self._grad_norm, grad_norm, is_far)
        found["loss_plateau"] = self._plateau(loss)
        return found

    def _plateau(self, loss: float) -> float:
        self._loss = _towards(self._loss, loss, _LOSS_HALF_LIFE)
        if not self._loss >= self._lowest:
            self._lowest, self._lowest_at = self._loss, self._count
        if self._count < _FEWEST_OF_PLATEAU:
            return math.nan
        return (self._count - self._lowest_at) / self._count


def _ratio(value: float, mean: float) -> float:
    return value / mean if mean > 0 else math.nan


def _learnt(mean: float, value: float, is_far: bool) -> float:
    return _towards(mean, value, _FALLEN_HALF_LIFE if is_far else _HALF_LIFE)


def _towards(mean: float, value: float, half_life: float) -> float:
    if not math.isfinite(value):
        return mean
    if math.isnan(mean):
        return value
    return mean + (1.0 - 0.5 ** (1.0 / half_life)) * (value - mean)
