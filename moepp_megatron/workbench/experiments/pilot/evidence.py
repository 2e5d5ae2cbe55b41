"""The evidence of a pilot: differences of losses, and their value in time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moepp_megatron.workbench.experiments.pilot.pooled import PooledLosses
from moepp_megatron.workbench.experiments.pilot.result import ArmKind
from moepp_megatron.workbench.experiments.pilot.statistics import Estimate


@dataclass(frozen=True)
class Evidence:
    """What the runs show.

    Attributes:
        token_value: Nats that an e-fold of tokens is worth to vanilla.
        in_time: Loss after vanilla's time minus vanilla's; the error of the measured speed, which
            decides how many steps that are, is included.
        in_compute: Loss minus that of the narrowed vanilla model.
        time_to_loss: Logarithm of the time to vanilla's loss over vanilla's; None where tokens are
            not clearly worth anything.
    """

    token_value: Estimate
    in_time: Estimate
    in_compute: Estimate
    time_to_loss: Estimate | None

    @staticmethod
    def of(
        losses: PooledLosses, names: Mapping[ArmKind, str], log_tokens: float, speed: Estimate
    ) -> Evidence:
        """Compute it.

        Args:
            losses: Losses of all arms.
            names: Names of the arms by kind.
            log_tokens: Logarithm of vanilla's tokens over those of the short runs.
            speed: Logarithm of MoE++'s step time over vanilla's.
        """
        vanilla, in_time = names["vanilla"], names["equal_time"]
        worth = {vanilla: -1.0 / log_tokens, names["short"]: 1.0 / log_tokens}
        value = losses.contrast(worth)
        # Only its error counts: the steps were chosen by the mean.
        error = Estimate(0.0, speed.error, speed.degrees)
        time = None
        if value.sign(0.025) > 0:
            time = _in_tokens(losses, in_time, vanilla, worth).plus(error)
        return Evidence(
            token_value=value,
            in_time=losses.difference(in_time, vanilla).plus(error, value.mean),
            in_compute=losses.difference(names["moepp"], names["narrow"]),
            time_to_loss=time,
        )


def _in_tokens(losses: PooledLosses, arm: str, other: str, worth: Mapping[str, float]) -> Estimate:
    """A loss difference over the value of tokens, with the error of both (the delta method)."""
    value = losses.contrast(worth).mean
    ratio = losses.difference(arm, other).mean / value
    weights = {arm: 1.0 / value}
    weights[other] = weights.get(other, 0.0) - 1.0 / value
    for name, weight in worth.items():
        weights[name] = weights.get(name, 0.0) - ratio * weight / value
    linear = losses.contrast(weights)
    return Estimate(ratio, linear.error, linear.degrees)
