"""The models that a pilot trains."""

from __future__ import annotations

import pytest

from moepp_megatron.config import ConfigError, with_overrides
from moepp_megatron.workbench.experiments.pilot.arms import (
    build_arms,
    configured_tau,
    matched_arms,
    narrow_width,
)
from tests.unit.workbench.experiments.pilot.synthetic import config_of


def test_every_kind_of_arm() -> None:
    arms = build_arms(config_of(), 40, [1.0, 0.5])
    assert [arm.arm.name for arm in arms] == [
        "vanilla",
        "MoE++ tau 1",
        "MoE++ tau 0.5",
        "MoE++ top-3 tau 1",
        "vanilla, 70% of the steps",
    ]
    kinds = [arm.arm.kind for arm in arms]
    assert kinds == ["vanilla", "moepp", "moepp", "more", "short"]
    assert [arm.arm.steps for arm in arms] == [40, 40, 40, 40, 28]
    assert [arm.config.moe.is_vanilla for arm in arms] == [True, False, False, False, True]
    # megatron-core's balance loss is E / K times the paper's: vanilla's strength is the same.
    assert arms[0].config.moe.balance_coeff == pytest.approx(0.08 * 2 / 8)


# 8 FFN and 4 other experts: phi = tau / (tau + 0.5).
@pytest.mark.parametrize(
    ("topk", "tau", "more"), [(2, 0.75, 3), (2, 0.5, 4), (4, 10.0, 5), (1, 1.0, 2)]
)
def test_more_selections_have_vanillas_compute(topk: int, tau: float, more: int) -> None:
    arms = build_arms(config_of(router_topk=topk), 40, [tau])
    found = next(arm for arm in arms if arm.arm.kind == "more")
    assert found.arm.topk == found.config.moe.router_topk == more
    assert more * found.config.moe.ffn_share == pytest.approx(topk, rel=1e-3)
    made = with_overrides(config_of(router_topk=topk), found.arm.overrides).moe
    assert (made.router_topk, made.tau) == (more, found.config.moe.tau)


def test_matching_arms() -> None:
    config = config_of()
    arm = build_arms(config, 40, [0.5])[1]
    longer, narrow = matched_arms(config, arm, steps=47, width=32)
    assert longer.arm.model_dump() == arm.arm.model_dump() | {
        "name": "MoE++ tau 0.5, vanilla's time",
        "kind": "equal_time",
        "steps": 47,
        "matches": "MoE++ tau 0.5",
    }
    assert longer.config.training.train_iters == 47
    assert longer.config.moe == arm.config.moe
    assert (narrow.arm.kind, narrow.arm.steps, narrow.arm.matches) == ("narrow", 40, arm.arm.name)
    assert narrow.config.moe.is_vanilla
    assert narrow.config.expert_ffn_hidden_size == 32
    assert narrow.config.moe.balance_coeff == pytest.approx(0.08 * 2 / 8)


@pytest.mark.parametrize(("share", "width"), [(0.5, 32), (0.7, 32), (0.9, 48), (0.01, 16)])
def test_narrow_widths_keep_their_alignment(share: float, width: int) -> None:
    assert narrow_width(config_of(), share) == width


def test_all_runs_validate_on_the_same_and_end_their_schedule() -> None:
    config = with_overrides(
        config_of(),
        [
            "training.eval_iters=3",
            "training.eval_interval=5",
            "optimizer.decay_iters=1000",
            "checkpoint.save_interval=10",
            "checkpoint.async_save=true",
            "observe.wandb.project=mine",
            "resilience.guard_window=64",
        ],
    )
    for arm in build_arms(config, 40, [0.75]):
        got = arm.config
        assert (got.training.eval_iters, got.training.eval_interval) == (8, 0)
        assert (got.training.train_iters, got.optimizer.decay_iters) == (arm.arm.steps, None)
        assert got.checkpoint.save_interval == 0
        assert got.observe.wandb.project is None
        assert got.resilience.guard_window == 64, "other settings stay"
        # 15 of 120 steps is an eighth.
        assert got.optimizer.warmup_iters == arm.arm.steps // 8
        assert 2 <= got.observe.health_interval <= arm.arm.steps // 4
    assert build_arms(config, 40, [0.75], eval_iters=2)[0].config.training.eval_iters == 2


def test_overrides_make_the_same_model() -> None:
    config = config_of(budget={"target_ffn_per_token": 1.0, "controller": "tau", "ramp_steps": 5})
    arms = build_arms(config, 40, [configured_tau(config), 0.75])
    same, other = arms[1], arms[2]
    # phi 1/2 with 8 FFN and 4 other experts.
    assert (same.arm.tau, same.arm.overrides) == (0.5, [])
    assert same.config.moe.budget.target_ffn_per_token == 1.0, "its own tau keeps the budget"
    assert not other.config.moe.budget.acts
    made = with_overrides(config, other.arm.overrides).moe
    assert (made.tau, made.budget.acts, made.ffn_share) == (0.75, False, other.config.moe.ffn_share)


def test_a_controller_without_a_target_holds_any_tau() -> None:
    config = config_of(budget={"controller": "tau"})
    arm = build_arms(config, 40, [0.5])[1]
    assert (arm.config.moe.tau, arm.config.moe.budget.controller) == (0.5, "tau")


def test_vanilla_and_too_few_steps_are_refused() -> None:
    none = {"num_zero_experts": 0, "num_copy_experts": 0, "num_constant_experts": 0}
    with pytest.raises(ConfigError, match=r"moe.num_zero_experts \(0\).*use 1"):
        build_arms(config_of(**none), 40, [0.75])
    with pytest.raises(ConfigError, match=r"--steps \(7\) must be at least 8"):
        build_arms(config_of(), 7, [0.75])


def test_short_runs_have_the_whole_schedule_and_the_full_batch() -> None:
    batch = config_of().training.global_batch_size
    wsd = ["optimizer.decay_style=WSD", "optimizer.decay_iters=100", "optimizer.wsd_decay_iters=20"]
    ramp = f"training.batch_ramp=[[0, {batch // 2}], [1000000, {batch}]]"
    config = with_overrides(config_of(), [*wsd, ramp])
    for arm in build_arms(config, 40, [1.0]):
        optimizer = arm.config.optimizer
        assert (optimizer.decay_iters, optimizer.wsd_decay_iters) == (None, arm.arm.steps // 5)
        assert arm.config.training.batch_ramp is None
