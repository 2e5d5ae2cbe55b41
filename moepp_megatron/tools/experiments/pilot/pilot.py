"""Runs a pilot in order, and computes its result.

1. Vanilla, MoE++ and the short runs, seed by seed.
2. Sessions that time MoE++ against vanilla, its routing held at the share it has shown.
3. MoE++ for vanilla's time and vanilla narrowed to MoE++'s compute, with the same seeds. Steps and
   width are fixed by the first look and are kept when seeds are added.

DIR/plan.json  written by the first call, completed once MoE++ was timed
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from pydantic import BaseModel, ValidationError

from moepp_megatron.config import Config, ConfigError
from moepp_megatron.runtime.atomic import write_atomic
from moepp_megatron.tools.experiments.pilot.arms import (
    Arm,
    ArmKind,
    PilotRun,
    RunOutcome,
    claim,
    first_arms,
    matched_arms,
    narrow_width,
    session,
)
from moepp_megatron.tools.experiments.pilot.statistics import Estimate, Interval, PooledLosses
from moepp_megatron.tools.experiments.pilot.verdict import Verdict, judge, level_of, sentence
from moepp_megatron.tools.experiments.runner import run_missing
from moepp_megatron.tools.experiments.timed_step import TimedStepTrial

PLAN_FILE = "plan.json"
SESSIONS = 5
"""Sessions that time MoE++."""
# Outcomes by arm and seed.
Outcomes = Mapping[ArmKind, Mapping[int, RunOutcome]]


class Match(BaseModel, extra="forbid", frozen=True):
    """Measurements of MoE++, and the arms that follow.

    Attributes:
        ffn_share: FFN share of its selections, mean over the seeds of the first look.
        log_time_ratio: Logarithm of its step time over vanilla's, mean over sessions.
        error: Standard error of that.
        steps: Its steps in vanilla's time.
        width: Inner width of the experts of the vanilla model with its compute.
    """

    ffn_share: float
    log_time_ratio: float
    error: float
    steps: int
    width: int


class PilotPlan(BaseModel, extra="forbid", frozen=True):
    """What a pilot fixes before any decision.

    Attributes:
        first: Seeds of the first look; the k-th look comes after k times as many.
        match: Measurements; None before MoE++ was timed.
    """

    first: int
    match: Match | None = None

    def write(self, folder: Path) -> None:
        """Write the file."""
        write_atomic(folder / PLAN_FILE, (self.model_dump_json(indent=1) + "\n").encode())

    def claim(self, folder: Path) -> PilotPlan:
        """The folder's own plan, or else this one, which is written; ConfigError: it is damaged."""
        try:
            return PilotPlan.model_validate_json((folder / PLAN_FILE).read_bytes())
        except FileNotFoundError:
            self.write(folder)
            return self
        except (OSError, ValidationError):
            raise ConfigError(
                f"--out ({folder}) must hold a readable {PLAN_FILE} of this version, and its own "
                "is not; choose another folder"
            ) from None


@dataclass(frozen=True)
class Pilot:
    """A pilot, finished or not.

    Attributes:
        folder: DIR, absolute.
        nproc: Ranks of each run and session.
        config: CONFIG with its overrides.
        steps: Steps of a run of vanilla and MoE++.
        seeds: All seeds.
        plan: What is fixed.
        command: The command line.
    """

    folder: Path
    nproc: int
    config: Config
    steps: int
    seeds: Sequence[int]
    plan: PilotPlan
    command: str

    @functools.cached_property
    def first_arms(self) -> list[Arm]:
        """The arms of the first stage."""
        return first_arms(self.config, self.steps)

    @functools.cached_property
    def matched_arms(self) -> list[Arm]:
        """The arms that match MoE++; none before it was timed."""
        match = self.plan.match
        if match is None:
            return []
        return matched_arms(self.config, self.steps, match.steps, match.width)

    @functools.cached_property
    def runs(self) -> list[PilotRun]:
        """All runs that are known, in their order."""
        pairs = [*product(self.seeds, self.first_arms), *product(self.seeds, self.matched_arms)]
        return [PilotRun.of(self.folder, self.nproc, arm, seed) for seed, arm in pairs]

    def _share(self) -> float | None:
        """FFN share of MoE++'s runs of the first look; None before they have finished."""
        runs = [run.result() for run in self.runs if run.arm.kind == "moepp"][: self.plan.first]
        shares = [outcome.ffn_share for outcome in runs if outcome is not None]
        return statistics.fmean(shares) if len(shares) == len(runs) else None

    def sessions(self) -> list[TimedStepTrial]:
        """The sessions; none before the runs of the first look, or once they were used."""
        share = self._share()
        if share is None or self.plan.match is not None:
            return []
        run = next(run for run in self.runs if run.arm.kind == "moepp")
        return [session(run, share, n + 1) for n in range(SESSIONS)]

    def matching(self) -> Pilot:
        """The pilot with its matching arms, if MoE++ was timed in full; writes the plan."""
        found = [trial.result() for trial in self.sessions()]
        ratios = [-math.log(both.speedup) for both in found if both is not None]
        share = self._share()
        if share is None or len(ratios) < SESSIONS:
            return self
        ratio = Estimate.of(ratios)
        assert ratio.error is not None, "several sessions"
        match = Match(
            ffn_share=share,
            log_time_ratio=ratio.mean,
            error=ratio.error,
            steps=max(round(self.steps * math.exp(-ratio.mean)), 1),
            width=narrow_width(self.config, share),
        )
        plan = self.plan.model_copy(update={"match": match})
        plan.write(self.folder)
        return replace(self, plan=plan)

    def run(self, progress: Callable[[str], object]) -> Pilot:
        """Do what is not finished; return the pilot with its matching arms.

        Args:
            progress: Called with the title of each run before it is begun.

        Raises:
            Interrupted: Stopped from outside.
            RunFailed: A run failed.
            ConfigError: A matching arm breaks a rule, or the folder belongs to other settings.
        """
        claim(self.folder, self.runs)
        run_missing(self.runs, progress)
        run_missing(self.sessions(), progress)
        whole = self.matching()
        claim(self.folder, whole.runs)
        run_missing(whole.runs, progress)
        return whole


@dataclass(frozen=True)
class ArmOutcome:
    """The outcome of an arm's runs, means over seeds.

    Attributes:
        valid_loss: Final validation loss, nats.
        loss_difference: Difference to vanilla with the same seed; None for vanilla.
        step_time_s: Median step of a run.
        time_ratio: Step time over vanilla's in the runs; None for vanilla and "short".
        ffn_share: FFN share of all selections, last quarter of the steps.
    """

    kind: ArmKind
    name: str
    steps: int
    valid_loss: Interval
    loss_difference: Interval | None
    step_time_s: Interval
    time_ratio: Interval | None
    ffn_share: Interval


@dataclass(frozen=True)
class PilotResult:
    """The content of pilot.json.

    All intervals are 95% t-intervals; those of loss differences take the noise from all arms
    together (statistics.py), those of speed are over sessions.

    Attributes:
        look: Number of the newest look; 0 before the first one, so that nothing is decided.
        next_seeds: Seeds of the next look.
        level: One-sided level that this look decides at.
        arms: Vanilla first.
        sentence: The answer for the person who decides.
    """

    command: str
    seeds: list[int]
    look: int
    next_seeds: int
    level: float
    arms: list[ArmOutcome]
    verdict: Verdict
    sentence: str


def result_of(pilot: Pilot) -> tuple[PilotResult, Outcomes] | None:
    """The result of the seeds that every arm has finished, and these runs.

    None before MoE++ was timed, and where no seed is finished.

    Raises:
        RunFailed: If a finished run has diverged.
    """
    plan, arms = pilot.plan, [*pilot.first_arms, *pilot.matched_arms]
    runs = _finished(pilot, arms)
    seeds = list(runs["vanilla"])
    if plan.match is None or not seeds:
        return None
    look = len(seeds) // plan.first
    if look > 0:
        # Decided by the runs of the look only: one seed more is not another look.
        seeds = seeds[: look * plan.first]
        runs = {kind: {seed: of[seed] for seed in seeds} for kind, of in runs.items()}
    losses = PooledLosses(
        {kind: {seed: run.valid_loss for seed, run in of.items()} for kind, of in runs.items()}
    )
    speed = Estimate(plan.match.log_time_ratio, plan.match.error, SESSIONS - 1)
    vanilla, _, short = pilot.first_arms
    in_runs = _log_time_ratio(runs["moepp"], runs["vanilla"])
    level = level_of(max(look, 1))
    log_tokens = math.log(vanilla.steps / short.steps)
    found = judge(losses, log_tokens, speed, in_runs, level if look else None)
    result = PilotResult(
        command=pilot.command,
        seeds=seeds,
        look=look,
        next_seeds=(look + 1) * plan.first,
        level=level,
        arms=[_arm_outcome(arm, runs, losses) for arm in arms],
        verdict=found,
        sentence=sentence(found, None if look else plan.first),
    )
    return result, runs


def _finished(pilot: Pilot, arms: Sequence[Arm]) -> Outcomes:
    """Outcomes of the seeds that every arm has finished."""
    found: dict[tuple[ArmKind, int], RunOutcome] = {}
    for run in pilot.runs:
        outcome = run.result()
        if outcome is not None:
            found[run.arm.kind, run.seed] = outcome
    whole = [seed for seed in pilot.seeds if all((arm.kind, seed) in found for arm in arms)]
    return {arm.kind: {seed: found[arm.kind, seed] for seed in whole} for arm in arms}


def _arm_outcome(arm: Arm, runs: Outcomes, losses: PooledLosses) -> ArmOutcome:
    mine, ratio, difference = list(runs[arm.kind].values()), None, None
    if arm.kind != "vanilla":
        difference = losses.difference(arm.kind, "vanilla").interval()
    # Vanilla has no ratio to itself, whatever its steps.
    if arm.kind not in ("vanilla", "short"):
        ratio = _log_time_ratio(runs[arm.kind], runs["vanilla"]).factor()
    return ArmOutcome(
        kind=arm.kind,
        name=arm.name,
        steps=arm.steps,
        valid_loss=Estimate.of([run.valid_loss for run in mine]).interval(),
        loss_difference=difference,
        step_time_s=Estimate.of([run.step_time_s for run in mine]).interval(),
        time_ratio=ratio,
        ffn_share=Estimate.of([run.ffn_share for run in mine]).interval(),
    )


def _log_time_ratio(runs: Mapping[int, RunOutcome], baseline: Mapping[int, RunOutcome]) -> Estimate:
    """Logarithm of the step time over that of the baseline's run with the same seed."""
    return Estimate.of(
        [math.log(run.step_time_s / baseline[seed].step_time_s) for seed, run in runs.items()]
    )
