"""Whether MoE++ pays, on made-up losses."""

import math

import pytest

from moepp_megatron.tools.experiments.pilot.result import ArmKind, Verdict
from moepp_megatron.tools.experiments.pilot.statistics import Estimate, PooledLosses
from moepp_megatron.tools.experiments.pilot.verdict import Evidence, sentence, verdict

NAMES: dict[ArmKind, str] = {
    "vanilla": "vanilla",
    "short": "short",
    "moepp": "moepp",
    "equal_time": "time",
    "narrow": "narrow",
}
RATIO = math.log(0.85)
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
    """Losses of five arms and three seeds."""
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
    return Evidence.of(table, NAMES, LOG_TOKENS, Estimate(RATIO, speed_error, 4))


def judged(
    in_time: float,
    in_compute: float,
    level: float | None = LEVEL,
    bias: float = 0.0,
    **table: float,
) -> Verdict:
    """The verdict where the runs show a step time that differs by `bias` from the sessions'."""
    found = evidence(losses(in_time, in_compute, **table))
    in_runs = Estimate(RATIO + math.log1p(bias), 0.02, 2)
    return verdict(found, Estimate(RATIO, 0.001, 4), in_runs, level)


def test_token_value_is_nats_for_an_e_fold() -> None:
    assert evidence(losses(0.0, 0.0)).token_value.mean == pytest.approx(VALUE)


def test_both_comparisons_must_be_clear() -> None:
    assert judged(-0.01, -0.01).answer == "pays"
    assert judged(-0.01, 0.0).answer == "undecided"
    assert judged(0.0, -0.01).answer == "undecided"
    assert judged(-0.01, 0.01).answer == "does not pay"
    assert judged(0.01, -0.01).answer == "does not pay"


@pytest.mark.parametrize("bias", [-0.011, 0.011, 0.5])
def test_speed_decides_nothing_where_runs_and_sessions_differ(bias: float) -> None:
    found = judged(-0.01, -0.01, bias=bias)
    assert (found.answer, found.speeds_agree) == ("undecided", False)
    assert f"{found.speed_in_runs.mean:.3f}" in sentence(found, None)
    assert judged(0.01, -0.01, bias=bias).answer == "undecided"
    # The same tokens and compute do not rest on the speed.
    assert judged(-0.01, 0.01, bias=bias).answer == "does not pay"


@pytest.mark.parametrize("bias", [-0.009, 0.009])
def test_a_small_difference_of_speeds_decides_as_usual(bias: float) -> None:
    found = judged(-0.01, -0.01, bias=bias)
    assert (found.answer, found.speeds_agree) == ("pays", True)


def test_nothing_is_decided_before_the_first_look() -> None:
    found = judged(-0.01, -0.01, level=None)
    assert found.answer == "undecided"
    assert found.loss_in_time.high is not None
    assert "before 5 seeds" in sentence(found, 5)


def test_a_stricter_level_leaves_it_open() -> None:
    assert judged(-0.003, -0.01, level=0.0125).answer == "pays"
    assert judged(-0.003, -0.01, level=0.0001).answer == "undecided"


def test_loss_after_vanillas_time_becomes_time() -> None:
    found = judged(-0.01, -0.01, behind=0.005)
    assert found.time_to_loss.mean == pytest.approx(math.exp(-0.1))


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
    assert found.time_to_loss is None
    assert found.answer == "pays", "losses decide"


@pytest.mark.parametrize(
    ("losses_", "start"),
    [
        ((-0.01, -0.01), "MoE++ pays here: after vanilla's time its loss is 0.0100 nats lower"),
        ((0.01, -0.01), "MoE++ does not pay here: after vanilla's time its loss is 0.0100 nats h"),
        ((-0.01, 0.01), "MoE++ does not pay here: a vanilla model of the same compute"),
        ((0.0, 0.0), "Undecided"),
    ],
)
def test_the_sentence_gives_the_number_that_decides(losses_: tuple[float, float], start: str):
    assert sentence(judged(*losses_), None).startswith(start)
