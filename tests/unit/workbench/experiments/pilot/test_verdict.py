"""Whether MoE++ pays, on made-up numbers."""

from __future__ import annotations

import math
import re

import pytest

from moepp_megatron.workbench.experiments.pilot import sentences
from moepp_megatron.workbench.experiments.pilot.equal_speed import equal_speed
from moepp_megatron.workbench.experiments.pilot.extrapolate import COST_MODEL_ERROR
from moepp_megatron.workbench.experiments.pilot.outcome import RunOutcome, arm_outcome
from moepp_megatron.workbench.experiments.pilot.result import Arm, ArmVerdict
from moepp_megatron.workbench.experiments.pilot.verdict import (
    AtTarget,
    TokenValue,
    by_favour,
    combined,
    recommended,
    verdict,
)
from tests.unit.workbench.experiments.pilot.synthetic import seeds

Runs = dict[int, RunOutcome]
VANILLA = seeds([4.0, 4.1, 4.2], [1.0, 1.01, 0.99])
# 0.1 nats an e-fold of tokens, with a little noise.
_GAIN = 0.1 * math.log(1 / 0.7)
SHORT = seeds([4.0 + _GAIN, 4.1 + _GAIN * 1.01, 4.2 + _GAIN * 0.99], [1.0] * 3)
FASTER = seeds([4.3, 4.4, 4.5], [0.7, 0.71, 0.69])
VALUE = TokenValue.of(VANILLA, SHORT, 100, 70)
ARM = Arm(name="MoE++ tau 0.5", kind="moepp", tau=0.5, topk=2, steps=100)


def judged(
    runs: Runs,
    value: TokenValue = VALUE,
    faster: Runs = FASTER,
    vanilla: Runs = VANILLA,
    at_target: AtTarget | None = None,
) -> ArmVerdict:
    outcome = arm_outcome(ARM, runs, vanilla)
    arms = {"vanilla": vanilla, "vanilla top-1": faster}
    equal = equal_speed(ARM.name, runs, arms)
    times = [run.step_time_s for run in arms[equal.slower].values()]
    return verdict(outcome, runs, vanilla, value, equal, sum(times) / len(times), at_target)


def moepp(difference: float, ratio: float, noise: float = 0.001) -> Runs:
    losses = [
        run.valid_loss + difference + sign * noise
        for run, sign in zip(VANILLA.values(), (0, 1, -1), strict=True)
    ]
    return seeds(losses, [run.step_time_s * ratio for run in VANILLA.values()])


def test_token_value_is_nats_for_an_e_fold() -> None:
    assert VALUE.interval.mean == pytest.approx(0.1)
    assert VALUE.is_clear


def test_it_pays() -> None:
    # 0.01 nats worse is 1.105 times the tokens, at 0.8 of the time.
    found = judged(moepp(0.01, 0.8))
    assert found.token_factor is not None
    assert found.time_to_loss is not None
    assert found.token_factor.mean == pytest.approx(math.exp(0.1), rel=1e-6)
    assert found.time_to_loss.mean == pytest.approx(0.8 * math.exp(0.1), rel=1e-6)
    assert (found.at_pilot, found.at_target) == ("pays", None)
    assert any("clearly better" in reason for reason in found.reasons)


def test_it_does_not_pay_against_vanilla() -> None:
    found = judged(moepp(0.03, 0.95))
    assert found.at_pilot == "does not pay"
    assert found.time_to_loss is not None
    assert found.time_to_loss.mean == pytest.approx(0.95 * math.exp(0.3), rel=1e-6)
    # exp(0.3) = 1.35 times the tokens, below the measured 1 / 0.7 = 1.43.
    assert not any("extrapolated" in reason for reason in found.reasons)
    far = judged(moepp(0.1, 0.95))
    assert any("extrapolated" in reason for reason in far.reasons)


def test_noise_leaves_it_undecided() -> None:
    found = judged(moepp(0.02, 0.85, noise=0.05))
    assert found.at_pilot == "undecided"


def test_a_rival_of_the_same_speed_that_is_better() -> None:
    # Sooner at vanilla's loss, but vanilla with one expert is as fast and has hardly lost.
    rival = seeds([4.002, 4.102, 4.203], [0.7, 0.71, 0.69])
    found = judged(moepp(0.01, 0.8), faster=rival)
    assert found.at_pilot == "does not pay"
    assert found.time_to_loss is not None
    assert found.time_to_loss.high is not None
    assert found.time_to_loss.high < 1
    equal = equal_speed(ARM.name, moepp(0.01, 0.8), {"vanilla": VANILLA, "top": rival})
    said = sentences.answer(found, equal, has_target=False)
    assert said.startswith("At this scale MoE++ does not pay")
    assert "learns less than a vanilla model of the same speed" in said


def test_a_rival_that_is_as_good_leaves_it_open() -> None:
    rival = seeds([4.014, 4.115, 4.215], [0.7, 0.71, 0.69])
    assert judged(moepp(0.01, 0.8), faster=rival).at_pilot == "undecided"


@pytest.mark.parametrize(
    ("rival", "expected"), [("better", "pays"), ("worse", "does not pay"), ("open", "undecided")]
)
def test_without_a_token_value_the_rival_alone_decides(rival: str, expected: str) -> None:
    assert combined(None, rival) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("losses", [[4.0, 4.2, 4.1], [3.9, 4.0, 4.1]])
def test_tokens_that_are_worth_nothing_make_no_factor(losses: list[float]) -> None:
    value = TokenValue.of(VANILLA, seeds(losses, [1.0] * 3), 100, 70)
    found = judged(moepp(0.01, 0.8), value=value)
    assert found.token_factor is None
    assert found.time_to_loss is None
    assert found.at_pilot == "pays", "clearly better than the rival of its speed"
    assert any("What tokens are worth cannot be told" in reason for reason in found.reasons)


def test_one_seed_is_never_decided() -> None:
    one = {1: VANILLA[1]}
    value = TokenValue.of(one, SHORT, 100, 70)
    found = judged({1: moepp(0.5, 2.0)[1]}, value, {1: FASTER[1]}, one)
    assert found.at_pilot == "undecided"
    assert found.time_to_loss is not None
    assert found.time_to_loss.low is None


def test_the_target_adds_the_cost_models_error() -> None:
    found = judged(moepp(0.01, 0.8), at_target=AtTarget(0.85))
    assert (found.at_pilot, found.at_target) == ("pays", "undecided")
    factor, time = found.token_factor, found.target_time_to_loss
    assert factor is not None
    assert time is not None
    assert factor.low is not None
    assert time.low is not None
    assert time.mean == pytest.approx(0.85 * factor.mean)
    assert time.low == pytest.approx(0.85 * factor.low / (1 + COST_MODEL_ERROR))
    assert judged(moepp(0.01, 0.8), at_target=AtTarget(0.7)).at_target == "pays"
    assert judged(moepp(0.01, 0.8), at_target=AtTarget(1.2)).at_target == "does not pay"
    assert judged(moepp(0.01, 0.8), at_target=AtTarget(None)).at_target == "undecided"


def test_the_most_favourable_comes_first_and_nothing_is_recommended_that_does_not_pay() -> None:
    good, fair = judged(moepp(0.01, 0.75)), judged(moepp(0.01, 0.8))
    bad = judged(moepp(0.03, 0.95))
    assert by_favour([bad, fair, good]) == [good, fair, bad]
    assert recommended(by_favour([bad, good])) == ARM.name
    assert recommended([bad]) is None
    # The target decides where there is one.
    far = judged(moepp(0.01, 0.75), at_target=AtTarget(1.2))
    assert recommended([far]) is None


def test_what_is_undecided_is_not_recommended() -> None:
    unsure = judged(moepp(0.02, 0.85, noise=0.05))
    assert unsure.at_pilot == "undecided"
    assert recommended([unsure]) is None
    # Clear in the pilot, open at the target, about which one decides.
    assert recommended([judged(moepp(0.01, 0.8), at_target=AtTarget(0.85))]) is None


def test_an_interval_too_wide_to_mean_anything_is_said_in_words() -> None:
    """Not "between 100% less and 7.56e+03 times"."""
    runs = moepp(0.02, 0.85, noise=0.5)
    equal = equal_speed(ARM.name, runs, {"vanilla": VANILLA, "vanilla top-1": FASTER})
    found = judged(runs)
    assert found.time_to_loss is not None
    assert found.time_to_loss.high is not None
    assert found.time_to_loss.high > 1000
    text = sentences.answer(found, equal, has_target=False)
    assert (
        "may need anything from less than a tenth of vanilla's time to more than ten times "
        "vanilla's time to vanilla's loss (95% interval)" in text
    )
    for said in (text, *found.reasons):
        assert not re.search(r"\de[+-]\d|100%", said)
    assert any("(95% interval under 0.01 to over 100)" in reason for reason in found.reasons)


def test_answers_in_words() -> None:
    runs = moepp(0.01, 0.8)
    equal = equal_speed(ARM.name, runs, {"vanilla": VANILLA, "vanilla top-1": FASTER})
    pays = sentences.answer(judged(runs), equal, has_target=False)
    assert pays.startswith(
        "At this scale MoE++ pays: with tau 0.5 it learns as much as vanilla in 12% less time (95%"
    )
    loses = sentences.answer(judged(moepp(0.03, 0.95)), equal, has_target=False)
    assert "does not pay" in loses
    assert "only with 28% more time (95% interval " in loses
    unsure = sentences.answer(judged(moepp(0.02, 0.85, noise=0.05)), equal, has_target=False)
    assert unsure.startswith("This pilot cannot tell whether MoE++ pays")
    found = judged(runs, at_target=AtTarget(1.2))
    both = sentences.answer(found, equal, has_target=True, target="large on 64 h100_sxm")
    assert "; for large on 64 h100_sxm it would not pay: " in both
