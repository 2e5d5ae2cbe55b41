"""The models that a pilot trains."""

import math

import pytest

from moepp_megatron.config import with_overrides
from moepp_megatron.experts import FFN_ONLY
from moepp_megatron.tools.experiments.pilot.arms import (
    _run_outcome,
    first_arms,
    matched_arms,
)
from moepp_megatron.tools.report.series import Numbers
from tests.refusals import config_error
from tests.unit.tools.experiments.pilot.synthetic import config_of, record

HEALTH = {"gate_entropy": [1.0]}


def test_the_first_stage():
    arms = first_arms(config_of(), 40)
    assert [(arm.name, arm.kind, arm.steps) for arm in arms] == [
        ("vanilla", "vanilla", 40),
        ("MoE++", "moepp", 40),
        ("vanilla, 70% of the steps", "short", 28),
    ]
    assert [arm.config.moe.is_vanilla for arm in arms] == [True, False, True]
    # megatron-core's balance loss is E / K times the paper's: vanilla's strength is the same.
    assert arms[0].config.moe.balance_coeff == pytest.approx(0.08 * 2 / 8)


def test_matching_arms():
    config = config_of()
    moepp = first_arms(config, 40)[1]
    longer, narrow = matched_arms(config, 40, equal_time=47, share=0.6)
    assert (longer.name, longer.kind) == ("MoE++, vanilla's time", "equal_time")
    assert longer.steps == 47
    assert longer.config.moe == moepp.config.moe
    assert (narrow.name, narrow.kind) == ("vanilla, 32 wide", "narrow")
    assert narrow.steps == 40
    assert narrow.config.moe.is_vanilla
    assert narrow.config.expert_ffn_hidden_size == 32
    assert narrow.config.moe.balance_coeff == pytest.approx(0.08 * 2 / 8)


@pytest.mark.parametrize(("share", "width"), [(0.5, 32), (0.7, 32), (0.9, 48), (0.01, 16)])
def test_narrow_widths_keep_their_alignment(share, width):
    narrow = matched_arms(config_of(), 40, 47, share)[1]
    assert narrow.config.expert_ffn_hidden_size == width


def test_all_runs_validate_on_the_same_and_end_their_schedule():
    config = with_overrides(
        config_of(),
        [
            "training.eval_iters=3",
            "training.eval_interval=5",
            "optimizer.decay_iters=1000",
            "checkpoint.save_interval=10",
            "checkpoint.async_save=true",
            "observe.wandb.project=mine",
            "resilience.guard_threshold=12",
        ],
    )
    for arm in first_arms(config, 40):
        got = arm.config
        assert (got.training.eval_iters, got.training.eval_interval) == (8, 0)
        assert got.optimizer.decay_iters is None
        assert got.checkpoint.save_interval == 0
        assert got.observe.wandb.project is None
        assert got.resilience.guard_threshold == 12, "other settings stay"
        # 15 of 120 steps is an eighth.
        assert got.optimizer.warmup_iters == arm.steps // 8


def test_vanilla_and_too_few_steps_are_refused():
    none = {**FFN_ONLY}
    with config_error(r"moe.num_zero_experts \(0\).*use 1"):
        first_arms(config_of(**none), 40)
    with config_error(r"--steps \(7\) must be at least 8"):
        first_arms(config_of(), 7)


def test_short_runs_have_the_whole_schedule_and_the_full_batch():
    batch = config_of().training.global_batch_size
    wsd = ["optimizer.decay_style=WSD", "optimizer.decay_iters=100", "optimizer.wsd_decay_iters=20"]
    ramp = f"training.batch_ramp=[[0, {batch // 2}], [1000000, {batch}]]"
    config = with_overrides(config_of(), [*wsd, ramp])
    for arm in first_arms(config, 40):
        optimizer = arm.config.optimizer
        assert (optimizer.decay_iters, optimizer.wsd_decay_iters) == (None, arm.steps // 5)
        assert arm.config.training.batch_ramp is None


def test_an_outcome_is_of_plain_warm_steps_and_the_last_quarter():
    records = [record(step, step_time_s=9.0, ffn_fraction=0.9) for step in range(1, 5)]
    records += [record(step, step_time_s=1.0, ffn_fraction=0.9) for step in range(5, 31)]
    records += [record(step, step_time_s=9.0, ffn_fraction=0.6) for step in range(31, 40)]
    # Those with router health are not timed, nor is the last one, which is evaluated.
    records[30:39] = [each.model_copy(update={"router_health": HEALTH}) for each in records[30:39]]
    last = {"ffn_fraction": 0.7, "valid_loss": 4.0, "step_time_s": 8.0, "loss": math.nan}
    found = _run_outcome(Numbers(records=[*records, record(40, **last)]))
    assert (found.valid_loss, found.step_time_s) == (4.0, 1.0)
    assert found.ffn_share == pytest.approx(0.61)
    assert found.curve.x.tolist() == [80.0 * step for step in range(1, 40)]


def test_a_run_of_measured_steps_alone_is_timed_all_the_same():
    records = [record(step, router_health=HEALTH, step_time_s=step) for step in range(1, 8)]
    records.append(record(8, router_health=HEALTH, valid_loss=4.0, step_time_s=8.0))
    assert _run_outcome(Numbers(records=records)).step_time_s == 5.5
