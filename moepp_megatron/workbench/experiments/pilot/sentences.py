"""The answer of a pilot, its reasons and what it cannot tell, in sentences."""

from __future__ import annotations

from moepp_megatron.workbench.experiments.pilot.evidence import Evidence
from moepp_megatron.workbench.experiments.pilot.result import (
    ArmOutcome,
    ArmVerdict,
    Interval,
    Stakes,
)
from moepp_megatron.workbench.experiments.pilot.schedule import LEVEL

# A factor on time beyond which, to either side, an interval says no more than that it is wide.
_LARGEST_FACTOR = 10.0


def pilot_reasons(outcome: ArmOutcome, evidence: Evidence) -> list[str]:
    """The numbers behind the answer at the pilot's scale.

    Args:
        outcome: The arm.
        evidence: What the runs say of it.
    """
    assert outcome.loss_difference is not None, "only vanilla has no difference to itself"
    reasons = [
        f"With {outcome.ffn_share.mean:.0%} of the selections on FFN experts its validation loss "
        f"after the same tokens differs from vanilla's by {nats(outcome.loss_difference)}.",
    ]
    if outcome.time_ratio is not None:
        reasons.append(f"A step takes {times(outcome.time_ratio)} vanilla's time.")
    reasons += [
        "Trained for vanilla's time its loss differs from vanilla's by "
        f"{nats(evidence.in_time.interval())}, the error of the measured speed included.",
        "From a vanilla model that is narrowed to its compute its loss differs by "
        f"{nats(evidence.in_compute.interval())} after the same tokens.",
    ]
    if evidence.time_to_loss is None:
        reasons.append(
            "What tokens are worth cannot be told: vanilla is not clearly better with all of the "
            "steps than with fewer, so a loss difference cannot be turned into time."
        )
    else:
        time = times(evidence.time_to_loss.factor())
        reasons.append(f"To reach vanilla's loss it needs {time} the time.")
    return reasons


def target_reasons(ratio: float | None, time: Interval | None) -> list[str]:
    """The numbers behind the answer at the target.

    Args:
        ratio: Step time over vanilla's.
        time: Time to vanilla's loss over vanilla's.
    """
    if ratio is None:
        return ["At the target it, or vanilla, does not fit the GPUs."]
    reasons = [f"At the target a step takes {ratio:.2f} times vanilla's by the cost model."]
    if time is not None:
        reasons.append(
            f"With the pilot's loss difference it would need {times(time)} the time to vanilla's "
            "loss there, the cost model's error included."
        )
    return reasons


def chances(probability: float | None, stakes: Stakes | None) -> str:
    """How probable "pays" is, and what a wrong decision costs; empty if nothing tells."""
    if probability is None:
        return ""
    text = f"By these runs alone the probability that it pays is {percent(probability)}."
    if stakes is None:
        return text
    return (
        f"{text} Expected over what they leave open, adopting it loses {stakes.adopted:.1%} of "
        f"vanilla's training time, and keeping vanilla gives away {stakes.kept:.1%}."
    )


def percent(probability: float) -> str:
    """A probability; beyond 99.9% its digits say nothing, and are left out."""
    if probability > 0.999:
        return "over 99.9%"
    return "under 0.1%" if probability < 0.001 else f"{probability:.1%}"


def answer(
    best: ArmVerdict, has_target: bool, target: str = "", first_look: int | None = None
) -> str:
    """One plain sentence.

    Args:
        best: The most favourable verdict.
        has_target: Whether a target was asked for.
        target: The target in words.
        first_look: Seeds of the first look, if it has not come; else None.
    """
    tau = best.arm.removeprefix("MoE++ ")
    if first_look is not None:
        return (
            f"Nothing is decided before {first_look} seeds: so far, trained for vanilla's time, "
            f"MoE++ with {tau} differs from vanilla's loss by {nats(best.loss_in_time)}."
        )
    if best.at_pilot == "pays":
        said = f"At this scale MoE++ pays: with {tau} it {_gain(best)}"
    elif best.at_pilot == "undecided":
        said = f"This pilot cannot tell whether MoE++ pays: with {tau} it {_open(best)}"
    else:
        said = f"At this scale MoE++ does not pay: with {tau} it {_loss(best)}"
    if not has_target:
        return f"{said}."
    return f"{said}; {_target_words(best, target)}."


def caveats(
    nproc: int, on_cpu: bool, seeds: int, steps: int, tokens: int, target_routing: str | None
) -> list[str]:
    """The limits of a pilot.

    Args:
        nproc: Ranks.
        on_cpu: Whether the ranks are on a CPU.
        seeds: Finished seeds.
        steps: Steps of a run.
        tokens: Tokens of a run.
        target_routing: Source of the target's unevenness; None without a target.
    """
    found = [
        f"Runs were short ({steps:,} steps, {tokens:,} tokens): how a loss difference changes with "
        "longer training is unknown, and routers are still settling.",
        "What share of the loss difference a larger model has is unknown: the pilot measures this "
        "model alone.",
        f"Settings such as the learning rate are those of the configuration for every model, on "
        f"{nproc} rank{'' if nproc == 1 else 's'}; another one may suit vanilla, or MoE++, better.",
    ]
    found.append(
        f"Losses of {seeds} seed{'' if seeds == 1 else 's'}: intervals hold if the noise of a run "
        "is normal and equally large in every arm. Decisions are made at looks fixed beforehand, "
        f'so that "pays" is wrong in {LEVEL:.1%} of pilots at most, however often they are asked.'
    )
    if on_cpu:
        found.append(
            "Speed is that of processor cores, where FFN experts are looped over one by one: it "
            "tells nothing of a GPU's."
        )
    if target_routing is not None:
        found.append(
            "The target's speed is the cost model's (median error of 7% against published "
            f"results), with {target_routing}; its loss difference is the pilot's."
        )
    return found


def times(factor: Interval) -> str:
    """A factor in words, such as "1.12 times (95% interval 1.06 to 1.19)"."""
    if factor.low is None or factor.high is None:
        return f"{plain_factor(factor.mean)} times (one seed)"
    ends = f"{plain_factor(factor.low)} to {plain_factor(factor.high)}"
    return f"{plain_factor(factor.mean)} times (95% interval {ends})"


def plain_factor(factor: float, digits: str = ".3g") -> str:
    """A factor; beyond a hundred to either side its digits say nothing, and are left out."""
    if factor > 100:
        return "over 100"
    return "under 0.01" if factor < 0.01 else f"{factor:{digits}}"


def nats(difference: Interval) -> str:
    """A loss difference, such as "+0.012 (95% interval +0.010 to +0.014) nats"."""
    if difference.low is None or difference.high is None:
        return f"{difference.mean:+.4f} nats (one seed)"
    ends = f"{difference.low:+.4f} to {difference.high:+.4f}"
    return f"{difference.mean:+.4f} nats (95% interval {ends})"


def _gain(best: ArmVerdict) -> str:
    time = best.time_to_loss
    if time is None or time.low is None or time.high is None:
        return f"has the lower loss after vanilla's time ({nats(best.loss_in_time)})"
    return (
        f"learns as much as vanilla in {1 - time.mean:.0%} less time (95% interval "
        f"{1 - time.high:.0%} to {1 - time.low:.0%})"
    )


def _loss(best: ArmVerdict) -> str:
    compute = best.loss_in_compute
    if best.loss_in_time.mean <= 0 or (compute.low is not None and compute.low > 0):
        return (
            "learns less than a vanilla model that is narrowed to its compute "
            f"({nats(best.loss_in_compute)})"
        )
    time = best.time_to_loss
    if time is None or time.low is None or time.high is None:
        return f"has the higher loss after vanilla's time ({nats(best.loss_in_time)})"
    return (
        f"learns as much as vanilla only with {_more(time.mean)} time (95% interval "
        f"{_more(time.low)} to {_more(time.high)})"
    )


def _open(best: ArmVerdict) -> str:
    time = best.time_to_loss
    if time is None or time.low is None or time.high is None:
        return f"differs by {nats(best.loss_in_time)} after vanilla's time"
    if time.high < 1:
        return (
            f"learns as much as vanilla in {1 - time.mean:.0%} less time, but a vanilla model that "
            "is narrowed to its compute may do as well, or the runs are too few to be sure"
        )
    if time.low < 1 / _LARGEST_FACTOR or time.high > _LARGEST_FACTOR:
        return (
            f"may need anything from {_bound(time.low)} to {_bound(time.high)} to vanilla's loss "
            "(95% interval): these runs tell nothing of the time"
        )
    return (
        f"needs between {_more(time.low)} and {_more(time.high)} time to vanilla's loss (95% "
        "interval)"
    )


def _bound(factor: float) -> str:
    """An end of an interval too wide for its digits to mean anything."""
    if factor < 1 / _LARGEST_FACTOR:
        return "less than a tenth of vanilla's time"
    if factor > _LARGEST_FACTOR:
        return "more than ten times vanilla's time"
    return f"{_more(factor)} time"


def _more(factor: float) -> str:
    """An increase, such as "12% more"; a factor where percentages are hard to read."""
    if factor >= 3:
        return f"{factor:.3g} times the"
    return f"{factor - 1:.0%} more" if factor >= 1 else f"{1 - factor:.0%} less"


def _target_words(best: ArmVerdict, target: str) -> str:
    time = best.target_time_to_loss
    if best.at_target is None or time is None:
        return f"for {target} nothing can be told"
    says = {
        "pays": "it would pay",
        "does not pay": "it would not pay",
        "undecided": "it is open whether it pays",
    }[best.at_target]
    if time.low is None or time.high is None:
        return f"for {target} {says} ({_more(time.mean)} time by the cost model)"
    return (
        f"for {target} {says}: {_more(time.low)} to {_more(time.high)} time to vanilla's loss by "
        "the cost model, if the loss difference stays as it is"
    )
