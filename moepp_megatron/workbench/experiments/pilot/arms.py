"""The models that a pilot compares, its arms, each as a configuration to train with.

First come vanilla, MoE++ at one or two tau, MoE++ with more selections per token at vanilla's
compute, and vanilla with fewer steps, which tells what tokens are worth. Once those have shown how
fast MoE++ is and what share of its selections goes to FFN experts, two more are made for each MoE++
arm: the same trained for vanilla's time, and vanilla narrowed to its compute.
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
    eval_iters = _eval_iters(config, eval_iters)
    base = with_overrides(config, run_settings(config, steps, eval_iters))
    moepp = [_moepp(base, tau, steps) for tau in taus]
    plain = vanilla(base)
    short = round(_SHORT_SHARE * steps)
    return [
        PilotArm(_arm(VANILLA, "vanilla", plain, steps), plain),
        *moepp,
        *_more(base, moepp[0].config, steps),
        PilotArm(
            _arm(f"vanilla, {_SHORT_SHARE:.0%} of the steps", "short", plain, short),
            with_overrides(plain, run_settings(config, short, eval_iters)),
        ),
    ]


def matched_arms(
    config: Config, arm: PilotArm, steps: int, width: int, eval_iters: int | None = None
) -> list[PilotArm]:
    """The arms that match a MoE++ arm: in vanilla's time, and vanilla in its compute.

    Args:
        config: The configuration that `build_arms` was given.
        arm: The MoE++ arm.
        steps: Steps of it in vanilla's time.
        width: Inner width of the FFN experts of the narrowed vanilla model.
        eval_iters: Global batches of validation, like those of `build_arms`.
    """
    batches = _eval_iters(config, eval_iters)
    longer = with_overrides(arm.config, run_settings(config, steps, batches))
    timed = arm.arm.model_copy(
        update={
            "name": f"{arm.arm.name}, vanilla's time",
            "kind": "equal_time",
            "steps": steps,
            "matches": arm.arm.name,
        }
    )
    base = with_overrides(config, run_settings(config, arm.arm.steps, batches))
    narrow = with_overrides(vanilla(base), [f"moe.ffn_hidden_size={width}"])
    name = f"vanilla, {width} wide, as {arm.arm.name}"
    described = _arm(name, "narrow", narrow, arm.arm.steps)
    return [
        PilotArm(timed, longer),
        PilotArm(described.model_copy(update={"matches": arm.arm.name}), narrow),
    ]


def narrow_width(config: Config, share: float) -> int:
    """The experts' width at which vanilla's FFN experts do `share` of their work.

    Rounded to what divides CONFIG's own width, up to 16, so that products keep their alignment.
    """
    width = config.expert_ffn_hidden_size
    unit = math.gcd(width, 16)
    return max(round(share * width / unit), 1) * unit


def _eval_iters(config: Config, asked: int | None) -> int:
    return max(_FEWEST_EVAL_ITERS, config.training.eval_iters) if asked is None else asked


def run_settings(config: Config, steps: int, eval_iters: int) -> list[str]:
    """Settings of every run that differ from CONFIG.

    The learning rate goes through all of its schedule within the run. Every step is logged, for
    its time; nothing is saved, loaded or sent anywhere.
    """
    optimizer, training = config.optimizer, config.training
    # An eighth of a short run, or the share that CONFIG has where that is more.
    share = max(1 / 8, optimizer.warmup_iters / training.train_iters)
    health = min(config.observe.health_interval or steps, max(2, steps // _HEALTH_RECORDS))
    settings = [] if optimizer.wsd_decay_iters is None else [_wsd_decay(config, steps)]
    return [
        *settings,
        f"training.train_iters={steps}",
        # Costs and losses are those of the batch that the long run ends with.
        "training.batch_ramp=null",
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


def _wsd_decay(config: Config, steps: int) -> str:
    """The same share of the run as CONFIG decays in."""
    optimizer, training = config.optimizer, config.training
    share = (optimizer.wsd_decay_iters or 0) / (optimizer.decay_iters or training.train_iters)
    return f"optimizer.wsd_decay_iters={max(int(share * steps), 1)}"


def configured_tau(config: Config) -> float:
    """The tau of CONFIG: that of its budget if it has one."""
    return float(f"{config.moe.balanced_tau:.4g}")


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


def _more(base: Config, moepp: Config, steps: int) -> list[PilotArm]:
    """MoE++ with more selections per token, at the tau that sends vanilla's number to FFNs.

    None where there are no more experts to select.
    """
    moe = moepp.moe
    topk = max(round(moe.router_topk / moe.ffn_share), moe.router_topk + 1)
    topk = min(topk, moe.num_experts)
    if topk == moe.router_topk:
        return []
    tau = moe.tau_for(moe.router_topk / topk)
    config, overrides = with_tau(base, tau)
    overrides = [*overrides, f"moe.router_topk={topk}"]
    arm = Arm(
        name=f"MoE++ top-{topk} tau {tau:.3g}",
        kind="more",
        tau=tau,
        topk=topk,
        steps=steps,
        overrides=overrides,
    )
    return [PilotArm(arm, with_overrides(config, [f"moe.router_topk={topk}"]))]


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
