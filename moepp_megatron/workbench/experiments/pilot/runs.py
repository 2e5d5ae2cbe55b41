"""The runs of a pilot: every arm with every seed.

DIR/configs, runs, logs  the same as for all training runs (experiments/training_runs.py)
DIR/pilot.json           the result
DIR/pilot.html           the page
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass

from moepp_megatron.config import with_overrides
from moepp_megatron.file_names import CONFIG_FILE
from moepp_megatron.workbench.experiments.pilot.arms import PilotArm
from moepp_megatron.workbench.experiments.pilot.outcome import RunOutcome, run_outcome
from moepp_megatron.workbench.experiments.pilot.result import Arm
from moepp_megatron.workbench.experiments.runs import in_turns
from moepp_megatron.workbench.experiments.training_runs import TrainingRun, TrainingRuns


@dataclass(frozen=True)
class PilotRun(TrainingRun):
    """One arm with one seed.

    Attributes:
        arm: The model.
        seed: The seed of initial weights and of the order of the data.
    """

    arm: Arm
    seed: int


class PilotRuns(TrainingRuns[PilotRun]):
    """The runs on disk."""

    def run_of(self, arm: PilotArm, seed: int) -> PilotRun:
        """The run of an arm with a seed."""
        name = run_name(arm.arm, seed)
        config = self.placed(name, with_overrides(arm.config, [f"training.seed={seed}"]))
        return PilotRun(name, f"seed {seed}, {arm.arm.name}", config, arm.arm, seed)

    def all_of(self, arms: Sequence[PilotArm], seeds: Sequence[int]) -> list[PilotRun]:
        """All runs in their order, seed by seed."""
        return [self.run_of(arm, seed) for arm, seed in in_turns(arms, seeds)]

    def outcome(self, run: PilotRun) -> RunOutcome | None:
        """What a finished run has shown; None where it is not finished.

        Raises:
            RunFailed: It has diverged.
        """
        records = self.records(run)
        return None if records is None else run_outcome(records, run.config.run.dir)

    def began(self, run: PilotRun) -> str:
        """Day of its start, ISO date: a run writes its configuration when it starts."""
        seconds = (run.config.run.dir / CONFIG_FILE).stat().st_mtime
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC).date().isoformat()


def run_name(arm: Arm, seed: int) -> str:
    """The name of the files of an arm's run with this seed."""
    words = arm.name.lower().replace("++", "pp").replace("%", "-percent").replace("'", "")
    return re.sub(r"[^a-z0-9.]+", "-", f"{words}-seed-{seed}")
