"""The models that a pilot compares, its arms, each as a configuration to train with.

They are vanilla, MoE++ at several tau, vanilla with fewer experts per token (the baselines), and
vanilla with fewer steps, which tells what tokens are worth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moepp_megatron.config import Config, ConfigError, with_overrides
from moepp_megatron.config.vanilla import vanilla, without_budget
from moepp_megatron.workbench.experiments.pilot.result import Arm, ArmKind

VANILLA = "vanilla"
# Of the steps, in the runs that tell what tokens are worth.
_SHORT_SHARE = 0.7
# A quarter of the steps counts for shares and health, and measured steps lie between others.
_FEWEST_STEPS = 8
# Validation batches where CONFIG asks for fewer: all arms see the same, so few are enough.
_FEWEST_EVAL_ITERS = 8
_HEALTH_RECORDS = 8


@dataclass(frozen=True)
class PilotArm:
    """A model of the pilot.

    Attributes:
        arm: Its description.
        config: Configuration of its runs, without folder and seed.
    """

    arm: Arm
    config: Config


def build_arms(
    config: Config, steps: int, taus: Sequence[float], eval_iters: int | None = None
) -> list[PilotArm]:
    """All arms, vanilla first.

    Args:
        config: A checked MoE++ configuration.
        steps: Steps of a run.
        taus: Weights of zero-computation experts; the configured one keeps `moe.budget`.
        eval_iters: Global batches of validation; None: as configured, at least 8.

    Raises:
        ConfigError: If CONFIG is vanilla, or a rule forbids an arm.
    """
    _check(config, steps)
    if eval_iters is None:
        eval_iters = max(_FEWEST_EVAL_ITERS, config.training.eval_iters)
    base = with_overrides(config, run_settings(config, steps, eval_iters))
    moepp = [_moepp(base, tau, steps) for tau in taus]
    plain = vanilla(base)
    short = round(_SHORT_SHARE * steps)
    return [
        PilotArm(_arm(VANILLA, "vanilla", plain, steps), plain),
        *moepp,
        *[_rival(base, topk, steps) for topk in _rival_topks(moepp)],
        PilotArm(
            _arm(f"vanilla, {_SHORT_SHARE:.0%} of the steps", "short", plain, short),
            with_overrides(plain, run_settings(config, short, eval_iters)),
        ),
    ]


def run_settings(config: Config, steps: int, eval_iters: int) -> list[str]:
    """Settings of every run that differ from CONFIG.

    The learning rate goes through all of its schedule within the run. Every step is logged, for
    its time; nothing is saved, loaded or sent anywhere.
    """
    optimizer, training = config.optimizer, config.training
    # An eighth of a short run, or the share that CONFIG has where that is more.
    share = max(1 / 8, optimizer.warmup_iters / training.train_iters)
    health = min(config.observe.health_interval or steps, max(2, steps // _HEALTH_RECORDS))
    return [
        f"training.train_iters={steps}",
        "training.log_interval=1",
        "training.eval_interval=0",
        f"training.eval_iters={eval_iters}",
        "training.profile_steps=[]",
        f"optimizer.warmup_iters={min(optimizer.warmup_iters, int(share * steps))}",
        "optimizer.decay_iters=null",
        "checkpoint.dir=null",
        "checkpoint.save_interval=0",
        "checkpoint.async_save=false",
        "checkpoint.keep=null",
        "checkpoint.load=null",
        "checkpoint.load_optimizer=true",
        f"observe.health_interval={health}",
        "observe.wandb.project=null",
        "observe.webhook_url_env=null",
    ]


def configured_tau(config: Config) -> float:
    """The tau of CONFIG: that of its budget if it has one."""
    return float(f"{config.moe.balanced_tau:.4g}")


def _rival_topks(moepp: Sequence[PilotArm]) -> list[int]:
    """Top-k values of the vanilla models whose FFN work is next to that of a MoE++ arm.

    K phi FFN experts per token are between two whole numbers; both are baselines, except vanilla
    itself and no expert at all.
    """
    found = set()
    for each in moepp:
        moe = each.config.moe
        # Rounded, so that 1 from K phi = 1 in floating point does not become 1 and 2.
        work = round(moe.router_topk * moe.ffn_share, 9)
        found |= {k for k in (math.floor(work), math.ceil(work)) if 1 <= k < moe.router_topk}
    return sorted(found, reverse=True)


def with_tau(config: Config, tau: float) -> tuple[Config, list[str]]:
    """The model at another tau, and the overrides that make it.

    A budget with a target belongs to its own tau and is dropped. A controller without a target
    holds the share of any tau and is kept.
    """
    if tau == configured_tau(config):
        return config, []
    budget = config.moe.budget
    overrides = [f"moe.tau={tau:g}"]
    if budget.target_ffn_per_token is None and budget.start_ffn_per_token is None:
        return with_overrides(config, overrides), overrides
    dropped = [
        "moe.budget.target_ffn_per_token=null",
        "moe.budget.start_ffn_per_token=null",
        "moe.budget.controller=none",
    ]
    return with_overrides(without_budget(config), overrides), overrides + dropped


def _moepp(base: Config, tau: float, steps: int) -> PilotArm:
    config, overrides = with_tau(base, tau)
    arm = Arm(
        name=f"MoE++ tau {tau:g}",
        kind="moepp",
        tau=tau,
        topk=config.moe.router_topk,
        steps=steps,
        overrides=overrides,
    )
    return PilotArm(arm, config)


def _rival(base: Config, topk: int, steps: int) -> PilotArm:
    # From CONFIG, since the coefficient of vanilla's balance loss follows from its selections.
    fewer = with_overrides(without_budget(base), [f"moe.router_topk={topk}"])
    config = vanilla(fewer)
    return PilotArm(_arm(f"vanilla top-{topk}", "rival", config, steps), config)


def _arm(name: str, kind: ArmKind, config: Config, steps: int) -> Arm:
    topk = config.moe.router_topk
    return Arm.model_validate(
        {"name": name, "kind": kind, "tau": None, "topk": topk, "steps": steps}
    )


def _check(config: Config, steps: int) -> None:
    if config.moe.num_zero_computation_experts == 0:
        raise ConfigError(
            "moe.num_zero_experts (0) and the other counts of zero-computation experts must not "
            "all be 0, because a pilot sets MoE++ beside vanilla; use 1"
        )
    if steps < _FEWEST_STEPS:
        raise ConfigError(
            f"--steps ({steps}) must be at least {_FEWEST_STEPS}, of which a quarter counts; use "
            "hundreds for a pilot that tells something"
        )
