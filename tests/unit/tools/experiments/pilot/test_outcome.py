"""From a run's records to its numbers."""

import math

import pytest

from moepp_megatron.observe.metrics import StepMetrics
from moepp_megatron.tools.experiments.pilot.outcome import arm_outcome, run_outcome, timed_steps
from moepp_megatron.tools.experiments.pilot.result import Arm, Interval
from moepp_megatron.tools.report.series import Numbers
from tests.unit.tools.experiments.pilot.synthetic import record, seeds

VANILLA = Arm(name="vanilla", kind="vanilla", steps=40)
MOEPP = Arm(name="MoE++", kind="moepp", steps=40)


def timed(records: list[StepMetrics]) -> list[float]:
    numbers = Numbers(records=records)
    return numbers.values("step")[timed_steps(numbers)].tolist()


def test_only_plain_warm_steps_are_timed() -> None:
    records = [record(step, step_time_s=9.0) for step in range(1, 5)]
    records += [record(step, step_time_s=1.0) for step in range(5, 40)]
    records[9] = record(10, step_time_s=7.0, router_health={"gate_entropy": [1.0]})
    records.append(record(40, step_time_s=8.0, valid_loss=4.0))
    # The first tenth is warming up.
    assert timed(records) == [step for step in range(5, 40) if step != 10]
    assert run_outcome(records).step_time_s == 1.0


def test_a_run_of_measured_steps_alone_is_timed_all_the_same() -> None:
    health = {"gate_entropy": [1.0]}
    records = [record(step, router_health=health) for step in range(1, 8)]
    records.append(record(8, router_health=health, valid_loss=4.0))
    assert timed(records) == [3, 4, 5, 6, 7, 8]


def test_the_share_is_of_the_last_quarter() -> None:
    records = [record(step, ffn_fraction=0.9) for step in range(1, 31)]
    records += [record(step, ffn_fraction=0.6) for step in range(31, 40)]
    records.append(record(40, ffn_fraction=0.7, valid_loss=4.0))
    assert run_outcome(records).ffn_share == pytest.approx(0.61)


def test_long_curves_are_thinned_to_means() -> None:
    records = [record(step, loss=float(step)) for step in range(1, 401)]
    records[-1] = record(400, loss=math.nan, valid_loss=4.0)
    curve = run_outcome(records).curve
    assert len(curve.loss) == 200
    assert (curve.tokens[0], curve.loss[0]) == (160, 1.5)
    # A number that is none is left out of its group.
    assert (curve.tokens[-1], curve.loss[-1]) == (32000, 399.0)


def test_an_arm_is_compared_in_pairs() -> None:
    vanilla = seeds([4.0, 5.0], [1.0, 2.0])
    mine = seeds([4.1, 5.1], [1.5, 3.0])
    found = arm_outcome(MOEPP, mine, vanilla, Interval(mean=0.1))
    assert found.loss_difference == Interval(mean=0.1)
    assert found.time_ratio is not None
    # Seeds differ by far more than arms do, which pairs do not see.
    assert (found.time_ratio.low, found.time_ratio.high) == pytest.approx((1.5, 1.5))
    assert found.valid_loss.mean == pytest.approx(4.6)
    assert found.curve.loss == [pytest.approx(4.6)]
    base = arm_outcome(VANILLA, vanilla, vanilla, None)
    assert (base.loss_difference, base.time_ratio) == (None, None)
