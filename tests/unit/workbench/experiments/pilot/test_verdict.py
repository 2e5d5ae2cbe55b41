"""Whether MoE++ pays, on made-up losses."""

from __future__ import annotations

import math
import re

import pytest

from moepp_megatron.workbench.experiments.pilot import sentences
from moepp_megatron.workbench.experiments.pilot.evidence import Evidence, Names
from moepp_megatron.workbench.experiments.pilot.extrapolate import COST_MODEL_ERROR
from moepp_megatron.workbench.experiments.pilot.outcome import arm_outcome
from moepp_megatron.workbench.experiments.pilot.pooled import PooledLosses
from moepp_megatron.workbench.experiments.pilot.result import Arm, ArmVerdict
from moepp_megatron.workbench.experiments.pilot.statistics import Estimate
from moepp_megatron.workbench.experiments.pilot.verdict import (
    AtTarget,
    answer_of,
    by_favour,
    recommended,
    verdict,
)
from tests.unit.workbench.experiments.pilot.synthetic import seeds

NAMES = Names("vanilla", "short", "moepp", "time", "narrow")
ARM = Arm(name="MoE++ tau 0.5", kind="moepp", tau=0.5, topk=2, steps=100)
VALUE = 0.1
LOG_TOKENS = math.log(1 / 0.7)
LEVEL = 0.0125
# Rows that sum to 0, so that the arms' means are exactly what a test says.
_NOISE = [[0, 1, -1], [1, -1, 0], [-1, 0, 1], [1, 0, -1], [-1, 1, 0]]


def losses(
    in_time: float,
    in_compute: float,
    behind: float = 0.0,
    value: float = VALUE,
    noise: float = 0.001,
) -> PooledLosses:
    """Losses of five arms and three seeds.

    Args:
        in_time: Of MoE++ after vanilla's time, minus vanilla's.
        in_compute: Of MoE++ after vanilla's steps, minus the narrowed model's.
        behind: Of MoE++ after vanilla's steps, minus vanilla's.
        value: What an e-fold of tokens is worth.
        noise: Of a run.
    """
    means = {
        "vanilla": 4.0,
        "short": 4.0 + value * LOG_TOKENS,
        "moepp": 4.0 + behind,
        "time": 4.0 + in_time,
        "narrow": 4.0 + behind - in_compute,
    }
    return PooledLosses(
        {
            name: {seed: mean + 0.1 * seed + noise * row[seed] for seed in range(3)}
            for (name, mean), row in zip(means.items(), _NOISE, strict=True)
        }
    )


def evidence(table: PooledLosses, speed_error: float = 0.001) -> Evidence:
    return Evidence.of(table, NAMES, LOG_TOKENS, Estimate(math.log(0.85), speed_error, 4))


def judged(
    in_time: float,
    in_compute: float,
    level: float | None = LEVEL,
    at_target: AtTarget | None = None,
    **table: float,
) -> ArmVerdict:
    runs = seeds([4.0, 4.1, 4.2], [0.85] * 3)
    outcome = arm_outcome(ARM, runs, runs, Estimate(0.0, 0.01, 8).interval())
    return verdict(outcome, evidence(losses(in_time, in_compute, **table)), level, at_target)


def test_token_value_is_nats_for_an_e_fold() -> None:
    assert evidence(losses(0.0, 0.0)).token_value.mean == pytest.approx(VALUE)


def test_both_comparisons_must_be_clear() -> None:
    assert judged(-0.01, -0.01).at_pilot == "pays"
    assert judged(-0.01, 0.0).at_pilot == "undecided"
    assert judged(0.0, -0.01).at_pilot == "undecided"
    assert judged(-0.01, 0.01).at_pilot == "does not pay"
    assert judged(0.01, -0.01).at_pilot == "does not pay"


def test_nothing_is_decided_before_the_first_look() -> None:
    found = judged(-0.01, -0.01, level=None, at_target=AtTarget(0.5))
    assert (found.at_pilot, found.at_target) == ("undecided", "undecided")
    assert found.loss_in_time.high is not None


def test_a_stricter_level_leaves_it_open() -> None:
    assert judged(-0.003, -0.01, level=0.0125).at_pilot == "pays"
    assert judged(-0.003, -0.01, level=0.0001).at_pilot == "undecided"


def test_loss_after_vanillas_time_becomes_time() -> None:
    found = judged(-0.01, -0.01, behind=0.005)
    assert found.time_to_loss is not None
    assert found.token_factor is not None
    assert found.time_to_loss.mean == pytest.approx(math.exp(-0.1))
    assert found.token_factor.mean == pytest.approx(math.exp(0.05))
    assert any("To reach vanilla's loss it needs" in reason for reason in found.reasons)


def test_the_error_of_the_measured_speed_is_included() -> None:
    table = losses(-0.01, -0.01)
    sure, unsure = evidence(table, 0.001).in_time, evidence(table, 0.1).in_time
    assert sure.error is not None
    assert unsure.error is not None
    assert unsure.mean == sure.mean
    # What 0.1 of log time is worth in nats.
    assert math.sqrt(unsure.error**2 - sure.error**2) == pytest.approx(0.1 * VALUE, rel=1e-2)
    assert evidence(table, 0.1).in_time.sign(LEVEL) == 0


@pytest.mark.parametrize("value", [0.0, -0.1])
def test_tokens_that_are_worth_nothing_make_no_time(value: float) -> None:
    found = judged(-0.01, -0.01, value=value)
    assert (found.token_factor, found.time_to_loss, found.stakes) == (None, None, None)
    assert found.at_pilot == "pays", "losses decide"
    assert any("What tokens are worth cannot be told" in reason for reason in found.reasons)


def test_probability_and_what_a_wrong_decision_costs() -> None:
    good, open_, bad = judged(-0.01, -0.01), judged(0.0, 0.0), judged(0.01, 0.01)
    assert good.probability == pytest.approx(1.0, abs=1e-3)
    assert open_.probability == pytest.approx(0.25)
    assert bad.probability == pytest.approx(0.0, abs=1e-3)
    assert good.stakes is not None
    assert bad.stakes is not None
    # 0.01 nats are a tenth of an e-fold of time.
    assert good.stakes.kept == pytest.approx(0.1, abs=1e-3)
    assert good.stakes.adopted == pytest.approx(0.0, abs=1e-3)
    assert bad.stakes.adopted == pytest.approx(0.1, abs=1e-3)
    text = sentences.chances(good.probability, good.stakes)
    assert "the probability that it pays is " in text
    assert "keeping vanilla gives away 10.0%" in text


def test_the_target_adds_the_cost_models_error() -> None:
    # 0.01 nats behind after the same tokens are exp(0.1) times the tokens.
    found = judged(-0.01, -0.01, behind=0.01, at_target=AtTarget(0.85))
    factor, time = found.token_factor, found.target_time_to_loss
    assert factor is not None
    assert factor.low is not None
    assert time is not None
    assert time.low is not None
    assert time.mean == pytest.approx(0.85 * factor.mean)
    assert time.low == pytest.approx(0.85 * factor.low / (1 + COST_MODEL_ERROR))
    assert (found.at_pilot, found.at_target) == ("pays", "undecided")

    def answer(ratio: float | None) -> str | None:
        return judged(-0.01, -0.01, behind=0.01, at_target=AtTarget(ratio)).at_target

    assert [answer(0.6), answer(1.3), answer(None)] == ["pays", "does not pay", "undecided"]


def test_the_most_favourable_comes_first_and_nothing_is_recommended_that_does_not_pay() -> None:
    good, fair, bad = judged(-0.02, -0.01), judged(-0.01, -0.01), judged(0.01, 0.01)
    assert by_favour([bad, fair, good]) == [good, fair, bad]
    assert recommended([good, bad]) == ARM.name
    assert recommended([bad]) is None
    assert recommended([judged(0.0, 0.0)]) is None
    # The target decides where there is one.
    assert recommended([judged(-0.02, -0.01, at_target=AtTarget(1.3))]) is None


@pytest.mark.parametrize(
    ("signs", "answer"),
    [((-1, -1), "pays"), ((-1, 0), "undecided"), ((-1, 1), "does not pay"), ((0, 0), "undecided")],
)
def test_the_answer_by_signs(signs: tuple[int, int], answer: str) -> None:
    assert answer_of(signs) == answer


def test_an_interval_too_wide_to_mean_anything_is_said_in_words() -> None:
    found = judged(0.0, 0.0, noise=0.03, value=0.4)
    assert found.time_to_loss is not None
    wide = found.model_copy(
        update={"time_to_loss": found.time_to_loss.model_copy(update={"low": 1e-4, "high": 5e3})}
    )
    text = sentences.answer(wide, has_target=False)
    assert (
        "may need anything from less than a tenth of vanilla's time to more than ten times "
        "vanilla's time to vanilla's loss (95% interval)" in text
    )
    assert not re.search(r"\de[+-]\d|100%", text)


def test_answers_in_words() -> None:
    pays = judged(-0.01, -0.01)
    said = sentences.answer(pays, has_target=False)
    assert said.startswith("At this scale MoE++ pays: with tau 0.5 it learns as much as vanilla in")
    said = sentences.answer(judged(0.01, -0.01), has_target=False)
    assert "does not pay" in said
    assert "only with 11% more time (95% interval " in said
    said = sentences.answer(judged(-0.01, 0.01), has_target=False)
    assert "learns less than a vanilla model that is narrowed to its compute" in said
    assert sentences.answer(judged(0.0, 0.0), has_target=False).startswith("This pilot cannot tell")
    early = judged(-0.01, -0.01, level=None)
    said = sentences.answer(early, has_target=False, first_look=5)
    assert said.startswith("Nothing is decided before 5 seeds: so far")
    both = sentences.answer(
        judged(-0.01, -0.01, behind=0.01, at_target=AtTarget(1.3)),
        has_target=True,
        target="large on 64 h100_sxm",
    )
    assert "; for large on 64 h100_sxm it would not pay: " in both
