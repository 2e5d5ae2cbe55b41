"""Runs a pilot in order, and computes its result.

1. Vanilla, MoE++ and the short runs, seed by seed.
2. Sessions that time MoE++ against vanilla, its routing held at the share it has shown.
3. MoE++ for vanilla's time and vanilla narrowed to MoE++'s compute, with the same seeds. Steps and
   width follow from the sessions and MoE++'s run with the first seed, also when seeds are added.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from moepp_megatron.config import Config
from moepp_megatron.tools.experiments.pilot.arms import (
    Arm,
    ArmKind,
    PilotRun,
    RunOutcome,
    first_arms,
    matched_arms,
    session,
)
from moepp_megatron.tools.experiments.pilot.verdict import LOOK, Verdict, judge, level_of, sentence
from moepp_megatron.tools.experiments.runner import claim, missing, run_missing
from moepp_megatron.tools.experiments.statistics import Estimate, Interval, PooledLosses
from moepp_megatron.tools.experiments.timed_step import TimedStepTrial

SESSIONS = 5
# Sections that say where a run is, not what it does.
_ELSEWHERE = {"run", "slurm"}
# Outcomes by arm and seed.
Outcomes = Mapping[ArmKind, Mapping[int, RunOutcome]]


@dataclass(frozen=True)
class Pilot:
    """A pilot as far as it was when its properties were first read; `replace` reads them again."""

    folder: Path
    nproc: int
    config: Config
    steps: int
    seeds: Sequence[int]
    command: str

    @property
    def trials(self) -> list[PilotRun | TimedStepTrial]:
        """All runs and sessions that are known."""
        return [*self.runs, *self.sessions]

    @property
    def left(self) -> int:
        """Number of trials without a result, unknown ones included."""
        done = len(self.trials) - len(missing(self.trials))
        return 5 * len(self.seeds) + SESSIONS - done

    @functools.cached_property
    def first_runs(self) -> list[PilotRun]:
        """The runs of the first stage."""
        return self._runs_of(first_arms(self.config, self.steps))

    @functools.cached_property
    def runs(self) -> list[PilotRun]:
        """All runs that are known, in their order; those that match MoE++ once it was timed."""
        shown = self._moepp.result()
        if self.speed is None or shown is None:
            return self.first_runs
        steps = max(round(self.steps * math.exp(-self.speed.mean)), 1)
        arms = matched_arms(self.config, self.steps, steps, shown.ffn_share)
        return self.first_runs + self._runs_of(arms)

    def _runs_of(self, arms: Sequence[Arm]) -> list[PilotRun]:
        pairs = product(self.seeds, arms)
        return [PilotRun.of(self.folder, self.nproc, arm, seed) for seed, arm in pairs]

    @property
    def _moepp(self) -> PilotRun:
        """MoE++'s run with the first seed."""
        return next(run for run in self.first_runs if run.arm.kind == "moepp")

    @functools.cached_property
    def sessions(self) -> list[TimedStepTrial]:
        """The sessions; none before MoE++ has shown its FFN share."""
        if (shown := self._moepp.result()) is None:
            return []
        return [session(self._moepp, shown.ffn_share, number + 1) for number in range(SESSIONS)]

    @functools.cached_property
    def speed(self) -> Estimate | None:
        """Logarithm of MoE++'s step time over vanilla's; None before all sessions."""
        found = [both.speedup for each in self.sessions if (both := each.result()) is not None]
        if len(found) < SESSIONS:
            return None
        return Estimate.of([-math.log(ratio) for ratio in found])

    def claim(self) -> None:
        """Make or check DIR and write all known configurations; ConfigError if it is another's."""
        content = self._moepp.config.model_dump(mode="json")
        settings = {name: keys for name, keys in content.items() if name not in _ELSEWHERE}
        files = {run.file: run.config.to_yaml(run.title) for run in self.runs}
        claim(self.folder, settings, ("configs", "runs", "logs", "speed"), files)

    def run(self, progress: Callable[[str], object]) -> Pilot:
        """Do what is not finished, each after a call of `progress`; return the finished pilot.

        Raises Interrupted if stopped from outside, RunFailed if a run failed, ConfigError if a
        matching arm breaks a rule.
        """
        run_missing(self.first_runs, progress)
        run_missing(replace(self).sessions, progress)
        whole = replace(self)
        whole.claim()
        run_missing(whole.runs, progress)
        return whole


@dataclass(frozen=True)
class _ArmOutcome:
    """The outcome of an arm's runs, means over seeds; losses in nats, less vanilla's."""

    kind: ArmKind
    name: str
    steps: int
    valid_loss: Interval
    loss_difference: Interval | None
    time_ratio: Interval | None
    ffn_share: Interval


@dataclass(frozen=True)
class PilotResult:
    """The content of pilot.json. All intervals are 95% t-intervals.

    Loss differences take the noise of all arms together (statistics.py); speeds are over sessions.
    """

    command: str
    seeds: list[int]
    look: int  # the newest; 0 before the first one, so that nothing is decided
    next_seeds: int
    level: float  # one-sided
    arms: list[_ArmOutcome]  # vanilla first
    verdict: Verdict
    sentence: str


def result_of(pilot: Pilot) -> tuple[PilotResult, Outcomes] | None:
    """Return the result of the seeds that every arm has finished, and these runs, if there are any.

    RunFailed if a finished run has diverged.
    """
    arms = {run.arm.kind: run.arm for run in pilot.runs}
    found = {
        (run.arm.kind, run.seed): outcome
        for run in pilot.runs
        if (outcome := run.result()) is not None
    }
    seeds = [seed for seed in pilot.seeds if all((kind, seed) in found for kind in arms)]
    if pilot.speed is None or not seeds:
        return None
    look = len(seeds) // LOOK
    # Decided by the runs of the look only: one seed more is not another look.
    seeds = seeds[: look * LOOK] or seeds
    runs = {kind: {seed: found[kind, seed] for seed in seeds} for kind in arms}
    losses = PooledLosses(
        {kind: {seed: run.valid_loss for seed, run in of.items()} for kind, of in runs.items()}
    )
    in_runs = _log_time_ratio(runs["moepp"], runs["vanilla"])
    level = level_of(max(look, 1))
    log_tokens = math.log(arms["vanilla"].steps / arms["short"].steps)
    verdict = judge(losses, log_tokens, pilot.speed, in_runs, level if look else None)
    result = PilotResult(
        command=pilot.command,
        seeds=seeds,
        look=look,
        next_seeds=(look + 1) * LOOK,
        level=level,
        arms=[_arm_outcome(arm, runs, losses) for arm in arms.values()],
        verdict=verdict,
        sentence=sentence(verdict, has_looked=look > 0),
    )
    return result, runs


def _arm_outcome(arm: Arm, runs: Outcomes, losses: PooledLosses) -> _ArmOutcome:
    mine, ratio, difference = list(runs[arm.kind].values()), None, None
    if arm.kind != "vanilla":
        difference = losses.difference(arm.kind, "vanilla").interval()
    # Vanilla has no ratio to itself, whatever its steps.
    if arm.kind not in ("vanilla", "short"):
        ratio = _log_time_ratio(runs[arm.kind], runs["vanilla"]).factor()
    return _ArmOutcome(
        kind=arm.kind,
        name=arm.name,
        steps=arm.steps,
        valid_loss=Estimate.of([run.valid_loss for run in mine]).interval(),
        loss_difference=difference,
        time_ratio=ratio,
        ffn_share=Estimate.of([run.ffn_share for run in mine]).interval(),
    )


def _log_time_ratio(runs: Mapping[int, RunOutcome], baseline: Mapping[int, RunOutcome]) -> Estimate:
    """Logarithm of the step time over that of the baseline's run with the same seed."""
    return Estimate.of(
        [math.log(run.step_time_s / baseline[seed].step_time_s) for seed, run in runs.items()]
    )
