"""From a run's records to its numbers."""

import json
import math
from pathlib import Path

import pytest

from moepp_megatron.observe.metrics import StepMetrics
from moepp_megatron.workbench.experiments.pilot.outcome import arm_outcome, run_outcome, timed_steps
from moepp_megatron.workbench.experiments.pilot.result import Arm, Interval
from moepp_megatron.workbench.report.series import Numbers
from tests.unit.workbench.experiments.pilot.synthetic import record, seeds

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
    assert run_outcome(records, Path("nowhere")).step_time_s == 1.0
    assert run_outcome(records, Path("nowhere")).tokens_per_s == 80.0


def test_a_run_of_measured_steps_alone_is_timed_all_the_same() -> None:
    health = {"gate_entropy": [1.0]}
    records = [record(step, router_health=health) for step in range(1, 8)]
    records.append(record(8, router_health=health, valid_loss=4.0))
    assert timed(records) == [3, 4, 5, 6, 7, 8]


def test_shares_are_of_the_last_quarter(tmp_path: Path) -> None:
    records = [record(step, ffn_fraction=0.9, a2a_bytes=500) for step in range(1, 31)]
    records += [
        record(step, ffn_fraction=0.6, a2a_bytes=300, router_health={"a": [1.0, math.nan]})
        for step in range(31, 40)
    ]
    records.append(record(40, ffn_fraction=0.7, valid_loss=4.0, a2a_bytes=400))
    alert = {
        "time": 0.0,
        "metric": "m",
        "value": 1.0,
        "condition": "> 0",
        "action": "warn",
        "step": 1,
    }
    severities = [("dead", "warning"), ("dead", "critical"), ("dead", "info"), ("jump", "warning")]
    lines = [json.dumps({**alert, "rule": r, "severity": s}) + "\n" for r, s in severities]
    (tmp_path / "alerts.jsonl").write_text("".join(lines))
    found = run_outcome(records, tmp_path)
    assert found.ffn_share == pytest.approx(0.61)
    assert found.a2a_bytes == pytest.approx(310)
    assert found.alerts == {"dead": 2, "jump": 1}, "back to normal is no alert"


def test_energy_leaves_warm_up_and_validation_out() -> None:
    records = [record(step, energy_j=1000.0) for step in range(1, 5)]
    records += [record(step, energy_j=160.0) for step in range(5, 40)]
    records.append(record(40, energy_j=5000.0, valid_loss=4.0))
    assert run_outcome(records, Path("nowhere")).energy_per_token_j == pytest.approx(2.0)
    records[20] = record(21)
    assert run_outcome(records, Path("nowhere")).energy_per_token_j is None


def test_long_curves_are_thinned_to_means() -> None:
    records = [record(step, loss=float(step)) for step in range(1, 401)]
    records[-1] = record(400, loss=math.nan, valid_loss=4.0)
    curve = run_outcome(records, Path("nowhere")).curve
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
