"""Runs a pilot in order: all arms, then their speed, then the arms matched by speed.

1. Vanilla, MoE++, MoE++ with more selections and the short runs, seed by seed.
2. Sessions that time each MoE++ arm beside vanilla, its routing held at the share it has shown.
3. For each MoE++ arm, itself for vanilla's time and vanilla narrowed to its compute, with the same
   seeds. Their steps and widths are fixed by the first look and are kept when seeds are added.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moepp_megatron.config import Config
from moepp_megatron.workbench.experiments.pilot.arms import (
    PilotArm,
    matched_arms,
    narrow_width,
)
from moepp_megatron.workbench.experiments.pilot.extrapolate import TargetRequest
from moepp_megatron.workbench.experiments.pilot.plan import Match, Plan
from moepp_megatron.workbench.experiments.pilot.runs import PilotRun, PilotRuns
from moepp_megatron.workbench.experiments.pilot.sessions import Session, SpeedSessions


@dataclass(frozen=True)
class Pilot:
    """A pilot, finished or not.

    Attributes:
        folder: Folder of its runs.
        config: CONFIG with its overrides.
        base: The arms of the first stage: vanilla first, "short" last.
        seeds: All seeds.
        plan: What is fixed.
        command: The command line.
        eval_iters: Global batches of validation; None for the default.
        target: Target to extrapolate to, or None.
    """

    folder: PilotRuns
    config: Config
    base: Sequence[PilotArm]
    seeds: Sequence[int]
    plan: Plan
    command: str
    eval_iters: int | None = None
    target: TargetRequest | None = None

    @property
    def moepp(self) -> list[PilotArm]:
        """The MoE++ arms about which is decided."""
        return [arm for arm in self.base if arm.arm.kind == "moepp"]

    @functools.cached_property
    def matched(self) -> list[PilotArm]:
        """The arms that match a MoE++ arm; none before it was timed."""
        return [
            matching
            for arm in self.moepp
            if (match := self.plan.matches.get(arm.arm.name)) is not None
            for matching in matched_arms(
                self.config, arm, match.steps, match.width, self.eval_iters
            )
        ]

    @property
    def arms(self) -> list[PilotArm]:
        """All arms that are known."""
        return [*self.base, *self.matched]

    def runs(self) -> list[PilotRun]:
        """All runs that are known, in their order."""
        early = self.folder.all_of(self.base, self.seeds)
        matched = self.matched
        return early + (self.folder.all_of(matched, self.seeds) if matched else [])

    def sessions(self) -> list[Session]:
        """The sessions of the arms that are not matched yet; none before their runs are there."""
        found = []
        for arm in self.moepp:
            share = None if arm.arm.name in self.plan.matches else self.ffn_share(arm)
            if share is not None:
                found += [Session(arm, share, n + 1) for n in range(self.plan.sessions)]
        return found

    @property
    def num_sessions(self) -> int:
        """Sessions of all arms that are not matched yet."""
        return self.plan.sessions * (len(self.moepp) - len(self.plan.matches))

    def ffn_share(self, arm: PilotArm) -> float | None:
        """FFN share of an arm's runs of the first look; None before they are finished."""
        shares = []
        for seed in self.seeds[: self.plan.first]:
            outcome = self.folder.outcome(self.folder.run_of(arm, seed))
            if outcome is None:
                return None
            shares.append(outcome.ffn_share)
        return statistics.fmean(shares)

    def matching(self, timed: SpeedSessions) -> Pilot:
        """The pilot with the matching arms of whatever was timed in full; writes the plan."""
        matches = dict(self.plan.matches)
        sessions = self.sessions()
        for arm in self.moepp:
            mine = [one for one in sessions if one.arm is arm]
            if mine and not timed.unfinished(mine):
                ratio = timed.log_time_ratio(mine)
                assert ratio is not None, "finished sessions have a result"
                matches[arm.arm.name] = Match(
                    ffn_share=mine[0].share,
                    log_time_ratio=ratio.mean,
                    error=ratio.error,
                    sessions=len(mine),
                    steps=max(round(arm.arm.steps * math.exp(-ratio.mean)), 1),
                    width=narrow_width(self.config, mine[0].share),
                )
        if matches == self.plan.matches:
            return self
        plan = self.plan.model_copy(update={"matches": matches})
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
