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
from pathlib import Path

from moepp_megatron.config import Config
from moepp_megatron.tools.experiments.pilot.arms import PilotArm, matched_arms, narrow_width
from moepp_megatron.tools.experiments.pilot.plan import Match, PilotPlan
from moepp_megatron.tools.experiments.pilot.result import ArmKind
from moepp_megatron.tools.experiments.pilot.statistics import Estimate
from moepp_megatron.tools.experiments.pilot.trials import PilotRun, Session, claim
from moepp_megatron.tools.experiments.runner import in_turns, run_missing


@dataclass(frozen=True)
class Pilot:
    """A pilot, finished or not.

    Attributes:
        folder: DIR, absolute.
        nproc: Ranks of each run and session.
        config: CONFIG with its overrides.
        base: The arms of the first stage.
        seeds: All seeds.
        plan: What is fixed.
        command: The command line.
        eval_iters: Global batches of validation; None for the default.
    """

    folder: Path
    nproc: int
    config: Config
    base: Sequence[PilotArm]
    seeds: Sequence[int]
    plan: PilotPlan
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

    @functools.cached_property
    def runs(self) -> list[PilotRun]:
        """All runs that are known, in their order."""
        pairs = in_turns(self.base, self.seeds) + in_turns(self.matched, self.seeds)
        return [PilotRun.of(self.folder, self.nproc, arm, seed) for arm, seed in pairs]

    def sessions(self) -> list[Session]:
        """The sessions; none before the runs of the first look, or once they were used."""
        if self.plan.match is not None:
            return []
        moepp = self.arm("moepp")
        runs = [run for run in self.runs if run.arm == moepp.arm]
        shown = [run.result() for run in runs[: self.plan.first]]
        shares = [outcome.ffn_share for outcome in shown if outcome is not None]
        if len(shares) < len(shown):
            return []
        place, share = (self.folder, self.nproc), statistics.fmean(shares)
        return [Session.of(*place, moepp, share, n + 1) for n in range(self.plan.sessions)]

    def matching(self) -> Pilot:
        """The pilot with its matching arms, if MoE++ was timed in full; writes the plan."""
        sessions = self.sessions()
        ratios = [found for each in sessions if (found := each.result()) is not None]
        if not sessions or len(ratios) < len(sessions):
            return self
        ratio = Estimate.of(ratios)
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
        plan.write(self.folder)
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
        claim(self.folder, self.runs)
        run_missing(self.runs, progress)
        run_missing(self.sessions(), progress)
        whole = self.matching()
        claim(self.folder, whole.runs)
        run_missing(whole.runs, progress, lambda run: finished(whole))
        return whole
