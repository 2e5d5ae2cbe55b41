"""The evidence of a pilot for one MoE++ arm: differences of losses, and their value in time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moepp_megatron.workbench.experiments.pilot.pooled import PooledLosses
from moepp_megatron.workbench.experiments.pilot.statistics import Estimate


@dataclass(frozen=True)
class Names:
    """The names of the arms that a MoE++ arm is compared with and by.

    Attributes:
        vanilla: The reference.
        short: Vanilla with fewer steps.
        moepp: The MoE++ arm, with vanilla's steps.
        equal_time: The same, trained for vanilla's time.
        narrow: Vanilla with the MoE++ arm's compute.
    """

    vanilla: str
    short: str
    moepp: str
    equal_time: str
    narrow: str


@dataclass(frozen=True)
class Evidence:
    """What the runs say of one MoE++ arm.

    Attributes:
        token_value: Nats that an e-fold of tokens is worth to vanilla.
        in_time: Loss after vanilla's time minus vanilla's; the error of the measured speed, which
            decides how many steps that are, is included.
        in_compute: Loss minus that of the narrowed vanilla model.
        token_factor: Logarithm of the tokens to vanilla's loss over vanilla's; None where tokens
            are not clearly worth anything.
        time_to_loss: Logarithm of the time to vanilla's loss over vanilla's; None likewise.
    """

    token_value: Estimate
    in_time: Estimate
    in_compute: Estimate
    token_factor: Estimate | None
    time_to_loss: Estimate | None

    @staticmethod
    def of(
        losses: PooledLosses, names: Names, log_tokens: float, log_time_ratio: Estimate
    ) -> Evidence:
        """Compute it.

        Args:
            losses: Losses of all arms.
            names: Which of them are what.
            log_tokens: Logarithm of vanilla's tokens over those of the short runs.
            log_time_ratio: Logarithm of the MoE++ arm's step time over vanilla's.
        """
        worth = {names.vanilla: -1.0 / log_tokens, names.short: 1.0 / log_tokens}
        value = losses.contrast(worth)
        # Only its error counts: the steps were chosen by the mean.
        speed = Estimate(0.0, log_time_ratio.error, log_time_ratio.degrees)
        in_time = losses.difference(names.equal_time, names.vanilla).plus(speed, value.mean)
        factor = time = None
        if value.sign(0.025) > 0:
            factor = _in_tokens(losses, names.moepp, names.vanilla, worth)
            time = _in_tokens(losses, names.equal_time, names.vanilla, worth).plus(speed)
        return Evidence(value, in_time, losses.difference(names.moepp, names.narrow), factor, time)


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
