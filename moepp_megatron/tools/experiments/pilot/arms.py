"""The arms of a pilot, and its trials: an arm with a seed, trained; MoE++ timed against vanilla.

First come vanilla, MoE++, and vanilla with fewer steps, which shows what tokens are worth. Once
those have shown how fast MoE++ is and what share of its selections goes to FFN experts, two more
follow: MoE++ trained for vanilla's time, and vanilla narrowed to MoE++'s compute.

DIR/configs/NAME.yaml  the resolved configuration of a run, for `moepp train` or `moepp slurm`
DIR/runs/NAME/         the run's own folder
DIR/speed/NAME.json    what one session has measured
"""

from __future__ import annotations

import math
import re
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from moepp_megatron.config import Config, ConfigError, with_overrides
from moepp_megatron.config.blends import with_whole_paths
from moepp_megatron.config.sections import settings_of_one_run
from moepp_megatron.config.vanilla import vanilla
from moepp_megatron.file_names import METRICS_FILE
from moepp_megatron.observe.metrics import MetricsError, read_metrics
from moepp_megatron.tools.experiments.runner import RunFailed, Trial
from moepp_megatron.tools.experiments.timed_step import TimedStepTrial
from moepp_megatron.tools.report.series import Numbers, Series, finite
from moepp_megatron.training.run_folder import refuse_running

# `equal_time` is MoE++ trained for vanilla's time, `narrow` vanilla with narrower experts and
# MoE++'s compute, `short` vanilla with fewer steps.
ArmKind = Literal["vanilla", "moepp", "equal_time", "narrow", "short"]
# Of the steps, in the runs that show what tokens are worth.
_SHORT_SHARE = 0.7
# A quarter of the steps counts for the share of FFN experts.
_FEWEST_STEPS = 8
# Validation batches where CONFIG asks for fewer: all arms see the same, so few are enough.
_FEWEST_EVAL_ITERS = 8
# Steps of each model in a session; each round begins with the other one.
_ROUNDS = 20
# A share of exactly 1 has no tau.
_LARGEST_TAU = 10.0
# A step that begins the last quarter is still in the third.
_LATE = 0.75
# First steps allocate, compile and fill caches.
_FEWEST_WARMUP, _WARMUP_SHARE = 2, 0.1


@dataclass(frozen=True)
class Arm:
    """A model of the pilot: its name as shown, and the configuration of its runs but for seeds."""

    kind: ArmKind
    name: str
    config: Config

    @property
    def steps(self) -> int:
        """Steps of each of its runs."""
        return self.config.training.train_iters


def first_arms(config: Config, steps: int) -> list[Arm]:
    """Return the first arms; ConfigError: CONFIG is vanilla, `steps` too few, or an arm refused."""
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
    moepp = _with_steps(config, steps)
    short = vanilla(_with_steps(config, round(_SHORT_SHARE * steps)))
    return [
        Arm("vanilla", "vanilla", vanilla(moepp)),
        Arm("moepp", "MoE++", moepp),
        Arm("short", f"vanilla, {_SHORT_SHARE:.0%} of the steps", short),
    ]


def matched_arms(config: Config, steps: int, equal_time: int, share: float) -> list[Arm]:
    """The arms that match MoE++: itself in vanilla's time, and vanilla in its compute.

    The narrowed experts are as wide as does `share` of the work, in units that divide CONFIG's own
    width, up to 16, so that products keep their alignment. `config` and `steps` are those of
    `first_arms`; MoE++ takes `equal_time` steps in vanilla's time.
    """
    unit = math.gcd(config.expert_ffn_hidden_size, 16)
    width = max(round(share * config.expert_ffn_hidden_size / unit), 1) * unit
    overrides = [f"moe.ffn_hidden_size={width}"]
    narrow = with_overrides(vanilla(_with_steps(config, steps)), overrides)
    return [
        Arm("equal_time", "MoE++, vanilla's time", _with_steps(config, equal_time)),
        Arm("narrow", f"vanilla, {width} wide", narrow),
    ]


def _with_steps(config: Config, steps: int) -> Config:
    """Fit the whole schedule into these steps; log each of them; save, load and send nothing."""
    optimizer, training = config.optimizer, config.training
    # An eighth of a short run, or the share that CONFIG has where that is more.
    share = max(1 / 8, config.warmup_iters / training.train_iters)
    settings = [
        *settings_of_one_run(),
        f"training.train_iters={steps}",
        # Costs and losses are those of the batch that the long run ends with.
        "training.batch_ramp=null",
        "training.log_interval=1",
        "training.eval_interval=0",
        f"training.eval_iters={max(_FEWEST_EVAL_ITERS, training.eval_iters)}",
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
    if optimizer.wsd_decay_iters is not None:
        share = optimizer.wsd_decay_iters / (optimizer.decay_iters or training.train_iters)
        settings.append(f"optimizer.wsd_decay_iters={max(int(share * steps), 1)}")
    return with_overrides(config, settings)


@dataclass(frozen=True)
class RunOutcome:
    """The outcome of one run."""

    valid_loss: float  # final, nats
    step_time_s: float  # median of the steps that only train
    ffn_share: float  # of all selections, last quarter of the steps
    curve: Series  # training loss over tokens


def _run_outcome(numbers: Numbers) -> RunOutcome:
    """The outcome of a finished run, whose last record has a finite validation loss."""
    steps = numbers.values("step")
    times, shares = numbers.values("step_time_s"), numbers.values("ffn_fraction")
    warm = steps > max(_FEWEST_WARMUP, int(_WARMUP_SHARE * steps[-1]))
    warm = warm if warm.any() else np.full(len(steps), True)
    # Evaluation and router health take time of their own; a short run may have no step without.
    plain = (
        warm & np.isnan(numbers.values("router_health")) & np.isnan(numbers.values("valid_loss"))
    )
    return RunOutcome(
        valid_loss=float(numbers.values("valid_loss")[-1]),
        step_time_s=statistics.median(times[plain if plain.any() else warm].tolist()),
        ffn_share=statistics.fmean(shares[steps > _LATE * steps[-1]].tolist()),
        curve=finite(numbers.values("tokens"), numbers.values("loss")),
    )


@dataclass(frozen=True)
class PilotRun(Trial[RunOutcome]):
    """One arm with one seed; finished when its last step has a validation loss."""

    arm: Arm
    seed: int
    config: Config
    file: Path

    @staticmethod
    def of(folder: Path, nproc: int, arm: Arm, seed: int) -> PilotRun:
        """The run of an arm with a seed; `folder` is absolute."""
        name = _run_name(arm, seed)
        config = with_overrides(arm.config, [f"training.seed={seed}"])
        run = config.run.model_copy(update={"dir": folder / "runs" / name, "name": name})
        # The files are for other folders to start from, too.
        config = config.model_copy(update={"run": run, "data": with_whole_paths(config.data)})
        file = folder / "configs" / f"{name}.yaml"
        title, command = f"seed {seed}, {arm.name}", ["train", str(file)]
        return PilotRun(folder, name, title, nproc, command, arm, seed, config, file)

    def prepare(self) -> None:
        """Remove what an interrupted run has left; ConfigError: somebody is doing it now."""
        super().prepare()
        refuse_running(Path(self.config.run.dir))
        shutil.rmtree(self.config.run.dir, ignore_errors=True)

    def result(self) -> RunOutcome | None:
        """Read a finished run's outcome; RunFailed: it has diverged."""
        folder = self.config.run.dir
        try:
            records = read_metrics(folder / METRICS_FILE)
        except MetricsError:
            return None
        last = records[-1]
        if last.step < self.arm.steps or last.valid_loss is None:
            return None
        if not math.isfinite(last.valid_loss):
            raise RunFailed(
                f"run {self.name} has diverged: its validation loss is {last.valid_loss}; look at "
                f"{folder}, or lower optimizer.lr"
            )
        return _run_outcome(Numbers(records=records))


def session(run: PilotRun, share: float, number: int) -> TimedStepTrial:
    """Session `number`, from 1, of a run's model, whose routing is held at this FFN share."""
    name = _run_name(run.arm, number).replace("-seed-", "-session-")
    file = run.folder / "speed" / f"{name}.json"
    words = [str(run.file), *_held_at(run.config, share)]
    return TimedStepTrial.of(file, f"speed, session {number}", run.nproc, words, _ROUNDS)


def _run_name(arm: Arm, seed: int) -> str:
    words = arm.name.lower().replace("++", "pp").replace("%", "-percent").replace("'", "")
    return re.sub(r"[^a-z0-9.]+", "-", f"{words}-seed-{seed}")


def _held_at(config: Config, share: float) -> list[str]:
    """Settings under which a perfect balance has this FFN share; a budget has its own and goes."""
    moe = config.moe
    settings = [f"moe.tau={moe.tau_for(min(share, moe.phi(_LARGEST_TAU))):.6g}"]
    if moe.budget.target_ffn_per_token is not None or moe.budget.start_ffn_per_token is not None:
        settings += [
            f"moe.budget.{key}=null" for key in ("target_ffn_per_token", "start_ffn_per_token")
        ]
        settings.append("moe.budget.controller=none")
    return settings
