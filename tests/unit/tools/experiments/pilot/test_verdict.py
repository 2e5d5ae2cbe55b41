"""The verdict on MoE++, on recorded and on made-up losses."""

import math

import pytest

from moepp_megatron.tools.experiments.pilot.verdict import (
    LEVEL,
    Verdict,
    judge,
    level_of,
    sentence,
)
from moepp_megatron.tools.experiments.statistics import Estimate, Interval, PooledLosses

RATIO = math.log(0.85)
VALUE = 0.1
LOG_TOKENS = math.log(1 / 0.7)
# Rows that sum to 0, so that the arms' means are exactly what a test says.
_NOISE = [[0, 1, -1], [1, -1, 0], [-1, 0, 1], [1, 0, -1], [-1, 1, 0]]
# The larger pilot of docs/pilot.md: five seeds.
RECORDED = {
    "vanilla": [4.0299, 3.96633, 3.95978, 3.95798, 3.99865],
    "moepp": [4.04385, 3.97969, 3.95775, 3.96543, 4.00792],
    "short": [4.2567, 4.19192, 4.18039, 4.18919, 4.22123],
    "equal_time": [3.99806, 3.93719, 3.91384, 3.92545, 3.97123],
    "narrow": [4.04788, 3.9856, 3.98162, 3.9898, 4.02325],
}


def test_the_recorded_pilot_is_judged_to_the_digit():
    losses = PooledLosses({arm: dict(enumerate(values)) for arm, values in RECORDED.items()})
    speed = Estimate(-0.07263252740467133, 0.009350270202119242, 4)
    found = judge(losses, LOG_TOKENS, speed, speed, level_of(1))
    assert found == Verdict(
        answer="pays",
        token_value=Interval(0.6318301967370914, 0.614431811597403, 0.6492285818767798),
        loss_in_time=Interval(-0.03337399999999979, -0.04950709331200878, -0.017240906687990807),
        loss_in_compute=Interval(
            -0.01470199999999977, -0.020907568044322616, -0.008496431955676923
        ),
        time_to_loss=Interval(0.9485496418080132, 0.9242437686172269, 0.9734947137595877),
        speed=Interval(0.92994249562795, 0.9061113846874993, 0.9544003748203546),
        speed_in_runs=Interval(0.92994249562795, 0.9061113846874993, 0.9544003748203546),
        speeds_agree=True,
    )
    assert sentence(found) == (
        "MoE++ pays here: after vanilla's time its loss is 0.0334 nats lower than vanilla's, and "
        "it reaches vanilla's loss in 0.95 of the time."
    )


def judged(in_time, in_compute, level=0.0125, bias=0.0, value=VALUE, speed_error=0.001):
    """The verdict where the runs show a step time that differs by `bias` from the sessions'."""
    means = {
        "vanilla": 4.0,
        "short": 4.0 + value * LOG_TOKENS,
        "moepp": 4.005,
        "equal_time": 4.0 + in_time,
        "narrow": 4.005 - in_compute,
    }
    losses = PooledLosses(
        {
            name: {seed: mean + 0.1 * seed + 0.001 * row[seed] for seed in range(3)}
            for (name, mean), row in zip(means.items(), _NOISE, strict=True)
        }
    )
    in_runs = Estimate(RATIO + math.log1p(bias), 0.02, 2)
    return judge(losses, LOG_TOKENS, Estimate(RATIO, speed_error, 4), in_runs, level)


@pytest.mark.parametrize(
    ("losses", "answer", "start"),
    [
        ((-0.01, -0.01), "pays", "MoE++ pays here: after vanilla's time its loss is 0.0100 nats l"),
        ((-0.01, 0.0), "undecided", "Undecided: these runs cannot tell"),
        ((0.0, -0.01), "undecided", "Undecided: these runs cannot tell"),
        ((-0.01, 0.01), "does not pay", "MoE++ does not pay here: a vanilla model of the same c"),
        (
            (0.01, -0.01),
            "does not pay",
            "MoE++ does not pay here: after vanilla's time its loss is",
        ),
    ],
)
def test_both_comparisons_must_be_clear(losses, answer, start):
    found = judged(*losses)
    assert found.answer == answer
    assert sentence(found).startswith(start)


@pytest.mark.parametrize("bias", [-0.011, 0.011, 0.5])
def test_speed_decides_nothing_where_runs_and_sessions_differ(bias):
    found = judged(-0.01, -0.01, bias=bias)
    assert (found.answer, found.speeds_agree) == ("undecided", False)
    assert f"{found.speed_in_runs.mean:.3f}" in sentence(found)
    assert judged(0.01, -0.01, bias=bias).answer == "undecided"
    # The same tokens and compute do not rest on the speed.
    assert judged(-0.01, 0.01, bias=bias).answer == "does not pay"
    small = judged(-0.01, -0.01, bias=math.copysign(0.009, bias))
    assert (small.answer, small.speeds_agree) == ("pays", True)


def test_nothing_is_decided_before_the_first_look_and_less_at_a_stricter_level():
    found = judged(-0.01, -0.01, level=None)
    assert found.answer == "undecided"
    assert found.loss_in_time.high is not None
    assert "before 5 seeds" in sentence(found, has_looked=False)
    assert judged(-0.003, -0.01).answer == "pays"
    assert judged(-0.003, -0.01, level=0.0001).answer == "undecided"


def test_loss_becomes_time_by_the_value_of_tokens():
    found = judged(-0.01, -0.01)
    assert found.token_value.mean == pytest.approx(VALUE)
    assert found.time_to_loss.mean == pytest.approx(math.exp(-0.1))


def test_the_error_of_the_measured_speed_is_included():
    sure, unsure = judged(-0.01, -0.01), judged(-0.01, -0.01, speed_error=0.1)
    assert unsure.loss_in_time.mean == sure.loss_in_time.mean
    # 0.1 of log time is worth 0.01 nats, with the 4 degrees of freedom of the sessions.
    assert unsure.loss_in_time.high - unsure.loss_in_time.mean == pytest.approx(0.0278, rel=0.01)
    assert unsure.answer == "undecided"


@pytest.mark.parametrize("value", [0.0, -0.1])
def test_tokens_that_are_worth_nothing_make_no_time(value):
    found = judged(-0.01, -0.01, value=value)
    assert found.time_to_loss is None
    assert found.answer == "pays", "losses decide"


def test_all_looks_together_spend_no_more_than_the_level():
    spent = sum(level_of(look) for look in range(1, 50))
    assert spent <= LEVEL
    assert spent == pytest.approx(LEVEL)
