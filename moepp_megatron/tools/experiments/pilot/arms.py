"""The models that a pilot compares, its arms, each as a configuration to train with.

First come vanilla, MoE++, and vanilla with fewer steps, which shows what tokens are worth. Once
those have shown how fast MoE++ is and what share of its selections goes to FFN experts, two more
are made: MoE++ trained for vanilla's time, and vanilla narrowed to MoE++'s compute.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moepp_megatron.config import Config, ConfigError, with_overrides
from moepp_megatron.config.sections import settings_of_one_run
from moepp_megatron.config.vanilla import vanilla
from moepp_megatron.tools.experiments.pilot.result import Arm

VANILLA = "vanilla"
MOEPP = "MoE++"
# Of the steps, in the runs that show what tokens are worth.
_SHORT_SHARE = 0.7
# A quarter of the steps counts for the share of FFN experts.
_FEWEST_STEPS = 8
# Validation batches where CONFIG asks for fewer: all arms see the same, so few are enough.
_FEWEST_EVAL_ITERS = 8


@dataclass(frozen=True)
class PilotArm:
    """A model of the pilot.

    Attributes:
        arm: Its description.
        config: Configuration of its runs, without folder and seed.
    """

    arm: Arm
    config: Config


def build_arms(config: Config, steps: int, eval_iters: int | None = None) -> list[PilotArm]:
    """The arms of the first stage: vanilla, MoE++, vanilla with fewer steps.

    Args:
        config: A checked MoE++ configuration.
        steps: Steps of a run.
        eval_iters: Global batches of validation; None: as configured, at least 8.

    Raises:
        ConfigError: If CONFIG is vanilla, or a rule forbids an arm.
    """
    _check(config, steps)
    moepp = _with_steps(config, steps, eval_iters)
    short = round(_SHORT_SHARE * steps)
    return [
        PilotArm(Arm(name=VANILLA, kind="vanilla", steps=steps), vanilla(moepp)),
        PilotArm(Arm(name=MOEPP, kind="moepp", steps=steps), moepp),
        PilotArm(
            Arm(name=f"vanilla, {_SHORT_SHARE:.0%} of the steps", kind="short", steps=short),
            vanilla(_with_steps(config, short, eval_iters)),
        ),
    ]


def matched_arms(
    config: Config, steps: int, equal_time: int, width: int, eval_iters: int | None = None
) -> list[PilotArm]:
    """The arms that match MoE++: itself in vanilla's time, and vanilla in its compute.

    Args:
        config: The configuration that `build_arms` was given.
        steps: Its steps.
        equal_time: Steps of MoE++ in vanilla's time.
        width: Inner width of the FFN experts of the narrowed vanilla model.
        eval_iters: Global batches of validation, like those of `build_arms`.
    """
    narrow = vanilla(_with_steps(config, steps, eval_iters))
    return [
        PilotArm(
            Arm(name=f"{MOEPP}, vanilla's time", kind="equal_time", steps=equal_time),
            _with_steps(config, equal_time, eval_iters),
        ),
        PilotArm(
            Arm(name=f"vanilla, {width} wide", kind="narrow", steps=steps),
            with_overrides(narrow, [f"moe.ffn_hidden_size={width}"]),
        ),
    ]


def narrow_width(config: Config, share: float) -> int:
    """The experts' width at which vanilla's FFN experts do `share` of their work.

    Rounded to what divides CONFIG's own width, up to 16, so that products keep their alignment.
    """
    width = config.expert_ffn_hidden_size
    unit = math.gcd(width, 16)
    return max(round(share * width / unit), 1) * unit


def _with_steps(config: Config, steps: int, eval_iters: int | None) -> Config:
    batches = max(_FEWEST_EVAL_ITERS, config.training.eval_iters)
    return with_overrides(config, run_settings(config, steps, eval_iters or batches))


def run_settings(config: Config, steps: int, eval_iters: int) -> list[str]:
    """Settings of every run that differ from CONFIG.

    The learning rate goes through all of its schedule within the run. Every step is logged, for
    its time; nothing is saved, loaded or sent anywhere.
    """
    optimizer, training = config.optimizer, config.training
    # An eighth of a short run, or the share that CONFIG has where that is more.
    share = max(1 / 8, config.warmup_iters / training.train_iters)
    settings = [] if optimizer.wsd_decay_iters is None else [_wsd_decay(config, steps)]
    return [
        *settings,
        *settings_of_one_run(),
        f"training.train_iters={steps}",
        # Costs and losses are those of the batch that the long run ends with.
        "training.batch_ramp=null",
        "training.log_interval=1",
        "training.eval_interval=0",
        f"training.eval_iters={eval_iters}",
        f"optimizer.warmup_iters={min(config.warmup_iters, int(share * steps))}",
        "optimizer.decay_iters=null",
        "checkpoint.dir=null",
        "checkpoint.save_interval=0",
        "checkpoint.async_save=false",
        "checkpoint.keep=null",
        "checkpoint.load=null",
        "checkpoint.load_optimizer=true",
        "observe.wandb.project=null",
        "observe.webhook_url_env=null",
    ]


def _wsd_decay(config: Config, steps: int) -> str:
    """The same share of the run as CONFIG decays in."""
    optimizer, training = config.optimizer, config.training
    share = (optimizer.wsd_decay_iters or 0) / (optimizer.decay_iters or training.train_iters)
    return f"optimizer.wsd_decay_iters={max(int(share * steps), 1)}"


def _check(config: Config, steps: int) -> None:
    if config.moe.num_zero_computation_experts == 0:
        raise ConfigError(
            "moe.num_zero_experts (0) and the other counts of zero-computation experts must not "
            "all be 0, because a pilot compares MoE++ with vanilla; use 1"
        )
    if steps < _FEWEST_STEPS:
        raise ConfigError(
            f"--steps ({steps}) must be at least {_FEWEST_STEPS}, of which a quarter counts; use "
            "hundreds for a pilot that can decide"
        )
