"""Runs a pilot in order: three arms, then their speed, then the arms matched by speed.

1. Vanilla, MoE++ and the short runs, seed by seed.
2. Sessions that time MoE++ against vanilla, its routing held at the share it has shown.
3. MoE++ for vanilla's time and vanilla narrowed to MoE++'s compute, with the same seeds. Steps and
   width are fixed by the first look and are kept when seeds are added.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moepp_megatron.config import Config
from moepp_megatron.workbench.experiments.pilot.arms import PilotArm, matched_arms, narrow_width
from moepp_megatron.workbench.experiments.pilot.plan import Match, Plan
from moepp_megatron.workbench.experiments.pilot.result import ArmKind
from moepp_megatron.workbench.experiments.pilot.runs import PilotRun, PilotRuns
from moepp_megatron.workbench.experiments.pilot.sessions import Session, SpeedSessions


@dataclass(frozen=True)
class Pilot:
    """A pilot, finished or not.

    Attributes:
        folder: Folder of its runs.
        config: CONFIG with its overrides.
        base: The arms of the first stage.
        seeds: All seeds.
        plan: What is fixed.
        command: The command line.
        eval_iters: Global batches of validation; None for the default.
    """

    folder: PilotRuns
    config: Config
    base: Sequence[PilotArm]
    seeds: Sequence[int]
    plan: Plan
    command: str
    eval_iters: int | None = None

    @functools.cached_property
    def matched(self) -> list[PilotArm]:
        """The arms that match MoE++; none before it was timed."""
        match = self.plan.match
        if match is None:
            return []
        steps = self.arm("moepp").arm.steps
        return matched_arms(self.config, steps, match.steps, match.width, self.eval_iters)

    @property
    def arms(self) -> list[PilotArm]:
        """All arms that are known."""
        return [*self.base, *self.matched]

    def arm(self, kind: ArmKind) -> PilotArm:
        """The arm of a kind; one of the last stage is known only once MoE++ was timed."""
        arms = self.base if kind in ("vanilla", "moepp", "short") else self.matched
        return next(arm for arm in arms if arm.arm.kind == kind)

    def runs(self) -> list[PilotRun]:
        """All runs that are known, in their order."""
        early = self.folder.all_of(self.base, self.seeds)
        return early + (self.folder.all_of(self.matched, self.seeds) if self.matched else [])

    def sessions(self) -> list[Session]:
        """The sessions; none before the runs of the first look, or once they were used."""
        share = None if self.plan.match is not None else self._ffn_share()
        if share is None:
            return []
        return [Session(self.arm("moepp"), share, n + 1) for n in range(self.plan.sessions)]

    def _ffn_share(self) -> float | None:
        """FFN share of MoE++'s runs of the first look; None before they are finished."""
        shares = []
        for seed in self.seeds[: self.plan.first]:
            outcome = self.folder.outcome(self.folder.run_of(self.arm("moepp"), seed))
            if outcome is None:
                return None
            shares.append(outcome.ffn_share)
        return statistics.fmean(shares)

    def matching(self, timed: SpeedSessions) -> Pilot:
        """The pilot with its matching arms, if MoE++ was timed in full; writes the plan."""
        sessions = self.sessions()
        if not sessions or timed.unfinished(sessions):
            return self
        ratio = timed.log_time_ratio(sessions)
        assert ratio.error is not None, "two sessions at least"
        share = sessions[0].share
        match = Match(
            ffn_share=share,
            log_time_ratio=ratio.mean,
            error=ratio.error,
            steps=max(round(self.arm("moepp").arm.steps * math.exp(-ratio.mean)), 1),
            width=narrow_width(self.config, share),
        )
        plan = self.plan.model_copy(update={"match": match})
        plan.write(self.folder.path)
        return dataclasses.replace(self, plan=plan)

    def run(self, progress: Callable[[str], object], finished: Callable[[Pilot], object]) -> Pilot:
        """Do what is not finished.

        Args:
            progress: Called with a line for people before each run.
            finished: Called with the pilot after each run of the last stage.

        Returns:
            The pilot with its matching arms.

        Raises:
            Interrupted: Stopped from outside.
            RunFailed: A run failed.
            ConfigError: A matching arm breaks a rule, or the folder belongs to other settings.
        """
        self.folder.claim(self.runs())
        self.folder.run_missing(self.runs(), progress)
        timed = SpeedSessions(self.folder.path, self.folder.nproc)
        with timed.writing():
            timed.run_missing(self.sessions(), progress)
        whole = self.matching(timed)
        runs = whole.runs()
        whole.folder.claim(runs)
        whole.folder.run_missing(runs, progress, lambda run: finished(whole))
        return whole
