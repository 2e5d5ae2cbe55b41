"""From the pilot's arms to the same models at the target's size."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from moepp_megatron.config import ConfigError, with_overrides
from moepp_megatron.config.hardware import load_hardware
from moepp_megatron.workbench.experiments.pilot.arms import build_arms
from moepp_megatron.workbench.experiments.pilot.extrapolate import (
    COST_MODEL_ERROR,
    TargetRequest,
    carried_share,
    measured_routing,
    with_share,
)
from moepp_megatron.workbench.experiments.pilot.outcome import arm_outcome
from moepp_megatron.workbench.experiments.pilot.result import PilotTarget
from moepp_megatron.workbench.experiments.pilot.runs import PilotRuns
from moepp_megatron.workbench.planning.imbalance import LEARNED, AssumedRouting
from moepp_megatron.workbench.planning.machine import machine_of
from moepp_megatron.workbench.planning.measured.published import held_out
from moepp_megatron.workbench.planning.plan import make_plan
from tests.unit.workbench.experiments.pilot.synthetic import config_of, record, seeds, write_run

LARGE = with_overrides(
    config_of(capacity_factor=1.5),
    [
        "model.hidden_size=1024",
        "model.ffn_hidden_size=4096",
        "model.num_attention_heads=16",
        "model.seq_length=2048",
        "model.vocab_size=32768",
        "training.global_batch_size=64",
        "precision.dtype=bf16",
    ],
)
H100 = machine_of(load_hardware("h100_sxm"))
REQUEST = TargetRequest("large", LARGE, 2, H100, 1e9, price_per_hour=2.0)
ARMS = build_arms(config_of(), 8, [1.0, 0.5])
NOMINAL = {arm.arm.name: arm.config.moe.ffn_share for arm in ARMS}


def extrapolated(
    share: float,
    routing: dict[str, AssumedRouting] | None = None,
    request: TargetRequest = REQUEST,
) -> PilotTarget:
    runs = seeds([4.0, 4.1], [1.0, 1.1])
    found = []
    for arm in ARMS:
        one = arm_outcome(arm.arm, runs, runs, None)
        mean = share if arm.arm.kind == "moepp" else 1.0
        found.append(
            one.model_copy(update={"ffn_share": one.ffn_share.model_copy(update={"mean": mean})})
        )
    return request.extrapolate(found, NOMINAL, routing)


def test_the_stated_error_is_that_of_the_published_table() -> None:
    errors = [abs(one.error or 0.0) for one in held_out() if one.run.row.scope == "in"]
    # Stated as a whole percent.
    assert statistics.median(errors) == pytest.approx(COST_MODEL_ERROR, abs=0.005)


def test_models_at_the_target_are_the_plans_own() -> None:
    # At its nominal share the arm is what `moepp plan` shows.
    target = extrapolated(NOMINAL["MoE++ tau 0.5"])
    plan = make_plan(with_overrides(LARGE, ["moe.tau=0.5"]), 2, H100, LEARNED)
    models = {model.arm: model for model in target.models}
    assert list(models) == ["vanilla", "MoE++ tau 1", "MoE++ tau 0.5"]
    assert plan.fastest is not None
    mine, vanilla = models["MoE++ tau 0.5"], models["vanilla"]
    assert mine.step_time_s == pytest.approx(plan.fastest.step.total)
    assert vanilla.step_time_s == pytest.approx(plan.baselines[0].step.total)
    assert mine.time_ratio == pytest.approx(plan.fastest.step.total / plan.baselines[0].step.total)
    assert vanilla.time_ratio == 1.0
    assert mine.hours is not None
    assert mine.hours == pytest.approx(plan.hours(plan.best, 1e9))
    assert mine.money == pytest.approx(mine.hours * 2 * 2.0)


def test_hours_at_the_target_count_smaller_first_steps() -> None:
    ramp = ["training.batch_ramp=[[0, 32], [200000000, 64]]"]
    whole = extrapolated(0.5).models
    slower = extrapolated(0.5, request=replace(REQUEST, config=with_overrides(LARGE, ramp))).models
    for plain, ramped in zip(whole, slower, strict=True):
        assert plain.hours is not None
        assert ramped.hours is not None
        assert ramped.hours > plain.hours
        assert ramped.step_time_s == plain.step_time_s


def test_the_measured_share_counts_not_the_nominal_one() -> None:
    few, many = extrapolated(0.3), extrapolated(0.9)
    times = [t.models[2].step_time_s for t in (few, many)]
    assert times[0] < times[1]  # type: ignore[operator]
    assert few.models[0] == many.models[0]


def test_measured_unevenness_slows_down() -> None:
    uneven = extrapolated(0.5, {arm.arm.name: AssumedRouting(2.0) for arm in ARMS})
    assert uneven.models[0].step_time_s >= extrapolated(0.5).models[0].step_time_s  # type: ignore[operator]


def test_shares_are_carried_over_by_how_far_phi_was_missed() -> None:
    assert carried_share(0.55, 0.6, 0.6) == pytest.approx(0.55)
    # Odds of 1.5 became 3; those of 1 become 2.
    assert carried_share(0.75, 0.6, 0.5) == pytest.approx(2 / 3)
    assert 0 < carried_share(0.0, 0.6, 0.6) < carried_share(1.0, 0.6, 0.6) < 1


def test_a_share_for_planning() -> None:
    config = with_share(with_overrides(LARGE, ["moe.balance_coeff=0.0"]), 0.37)
    assert config.moe.ffn_share == pytest.approx(0.37)


def test_recorded_routing_counts_where_experts_are_as_many(tmp_path: Path) -> None:
    runs = [PilotRuns(tmp_path).run_of(ARMS[1], seed) for seed in (7, 8)]
    for run in runs:
        write_run(run)
    found = measured_routing(runs, LARGE)
    assert found is not None
    assert found.evenness is not None
    assert measured_routing(runs, with_overrides(LARGE, ["moe.num_ffn_experts=16"])) is None
    file = runs[0].config.run.dir / "metrics.jsonl"
    file.write_text(record(8, layer_expert_share=None).to_json_line())
    assert measured_routing(runs, LARGE) is None


def test_targets_that_cannot_be_planned_are_refused() -> None:
    REQUEST.check()
    huge = with_overrides(LARGE, ["model.hidden_size=16384", "model.ffn_hidden_size=65536"])
    with pytest.raises(ConfigError, match=r"--gpus \(1\) must be enough"):
        TargetRequest("huge", huge, 1, H100, 1e9).check()
    none = ["moe.num_zero_experts=0", "moe.num_copy_experts=0", "moe.num_constant_experts=0"]
    plain = with_overrides(LARGE, none)
    with pytest.raises(ConfigError, match="--target .* zero-computation experts"):
        TargetRequest("vanilla", plain, 8, H100, 1e9).check()
