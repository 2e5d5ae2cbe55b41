"""Decides whether a MoE++ arm pays, from loss and speed.

A model that learns less from a token needs more of them. Vanilla's own runs with fewer steps give
the value of tokens: v nats for an e-fold. A loss difference d is then worth exp(d / v)
times the tokens, and equal loss takes exp(d / v) times the time ratio.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moepp_megatron.workbench.experiments.pilot import sentences
from moepp_megatron.workbench.experiments.pilot.equal_speed import Runs, Standing, standing
from moepp_megatron.workbench.experiments.pilot.extrapolate import COST_MODEL_ERROR
from moepp_megatron.workbench.experiments.pilot.outcome import log_time_ratios
from moepp_megatron.workbench.experiments.pilot.result import (
    Answer,
    ArmOutcome,
    ArmVerdict,
    EqualSpeed,
    Interval,
)
from moepp_megatron.workbench.experiments.pilot.statistics import (
    factor_interval,
    mean_interval,
    ratio_of_means,
)

_RANK: dict[Answer | None, int] = {"pays": 0, "undecided": 1, "does not pay": 2, None: 3}


@dataclass(frozen=True)
class TokenValue:
    """The value of an e-fold of tokens to vanilla, seed by seed.

    Attributes:
        by_seed: Nats by seed.
        measured: Log of the ratio of tokens that was measured; loss differences worth more are
            extrapolated.
    """

    by_seed: Mapping[int, float]
    measured: float

    @classmethod
    def of(cls, full: Runs, short: Runs, steps: int, short_steps: int) -> TokenValue:
        """Compute it from vanilla's runs with all and with fewer steps."""
        measured = math.log(steps / short_steps)
        gains = {seed: (short[seed].valid_loss - full[seed].valid_loss) / measured for seed in full}
        return cls(gains, measured)

    @property
    def interval(self) -> Interval:
        """The interval over seeds."""
        return mean_interval(list(self.by_seed.values()))

    @property
    def is_clear(self) -> bool:
        """Whether it is clearly above 0, so that it can be a divisor."""
        found = self.interval
        return (found.mean if found.low is None else found.low) > 0


def _answer_of(factor: Interval | None) -> Answer:
    """The answer by the interval of a factor on time: below 1 it pays."""
    if factor is None or factor.low is None or factor.high is None:
        return "undecided"
    if factor.high < 1:
        return "pays"
    return "does not pay" if factor.low > 1 else "undecided"


def combined(time: Interval | None, baseline: Standing | None) -> Answer:
    """The answer from time to vanilla's loss and from the comparison at equal speed.

    Args:
        time: Time to loss over vanilla's; None if unknown.
        baseline: Outcome against the vanilla model of the same speed; None if inconclusive.
    """
    by_time = _answer_of(time)
    if baseline == "worse" or by_time == "does not pay":
        return "does not pay"
    if time is None:
        return "pays" if baseline == "better" else "undecided"
    # Sooner than vanilla, but fewer experts in vanilla may do as well.
    return "undecided" if baseline == "open" else by_time


def verdict(
    outcome: ArmOutcome,
    runs: Runs,
    vanilla: Runs,
    value: TokenValue,
    equal: EqualSpeed,
    slower_time: float,
    at_target: AtTarget | None = None,
) -> ArmVerdict:
    """The verdict on a MoE++ arm.

    Args:
        outcome: The arm.
        runs: Its runs.
        vanilla: The runs of vanilla, with the same seeds.
        value: The value of tokens.
        equal: Its comparison at equal speed.
        slower_time: Mean step of `equal.slower`.
        at_target: The arm at the target, or None.
    """
    seeds = list(runs)
    pairs = [(runs[seed], vanilla[seed]) for seed in seeds]
    stands = standing(equal, outcome.step_time_s.mean, slower_time)
    factor = time = target_time = None
    if value.is_clear:
        differences = [one.valid_loss - other.valid_loss for one, other in pairs]
        logs = ratio_of_means(differences, [value.by_seed[seed] for seed in seeds])
        factor = factor_interval(logs)
        times = [log + t for log, t in zip(logs, log_time_ratios(pairs), strict=True)]
        time = factor_interval(times)
        if at_target is not None and at_target.time_ratio is not None:
            scaled = [log + math.log(at_target.time_ratio) for log in logs]
            target_time = factor_interval(scaled, widened_by=COST_MODEL_ERROR)
    reasons = sentences.pilot_reasons(outcome, factor, time, equal, stands, value.measured)
    answer_at_target: Answer | None = None
    if at_target is not None:
        answer_at_target = combined(target_time, at_target.stands)
        reasons += sentences.target_reasons(
            at_target.time_ratio, target_time, at_target.equal, at_target.stands
        )
    return ArmVerdict(
        arm=outcome.arm.name,
        token_factor=factor,
        time_to_loss=time,
        target_time_to_loss=target_time,
        at_pilot=combined(time, stands),
        at_target=answer_at_target,
        reasons=reasons,
    )


@dataclass(frozen=True)
class AtTarget:
    """A MoE++ arm at the target's size.

    Attributes:
        time_ratio: Step time over vanilla's; None where either does not fit.
        equal: Comparison with an equally fast vanilla model there; None if there is none.
        stands: Outcome of that comparison.
    """

    time_ratio: float | None
    equal: EqualSpeed | None = None
    stands: Standing | None = None


def by_favour(verdicts: Sequence[ArmVerdict]) -> list[ArmVerdict]:
    """Verdicts, the most favourable first: by the target's answer if there is one, then by time."""

    def order(one: ArmVerdict) -> tuple[int, int, float]:
        time = one.target_time_to_loss or one.time_to_loss
        first = one.at_target if one.at_target is not None else one.at_pilot
        return _RANK[first], _RANK[one.at_pilot], time.mean if time is not None else math.inf

    return sorted(verdicts, key=order)


def recommended(verdicts: Sequence[ArmVerdict]) -> str | None:
    """The arm to go on with; None where none has been shown to pay.

    Args:
        verdicts: Verdicts, the most favourable first.
    """
    best = verdicts[0]
    answer = best.at_target if best.at_target is not None else best.at_pilot
    return best.arm if answer == "pays" else None
