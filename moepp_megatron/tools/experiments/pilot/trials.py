"""The trials of a pilot: an arm with a seed, trained; and MoE++ timed against vanilla.

DIR/configs/NAME.yaml  the resolved configuration of a run, for `moepp train` or `moepp slurm`
DIR/runs/NAME/         the run's own folder
DIR/speed/NAME.json    what `moepp bench step` has measured in one session
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepp_megatron.config import Config, ConfigError, load_config, with_overrides
from moepp_megatron.config.blends import with_whole_paths
from moepp_megatron.file_names import CONFIG_FILE, METRICS_FILE
from moepp_megatron.observe.metrics import MetricsError, read_metrics
from moepp_megatron.runtime.atomic import write_atomic
from moepp_megatron.runtime.printable import printable_time
from moepp_megatron.tools.experiments.pilot.arms import PilotArm
from moepp_megatron.tools.experiments.pilot.outcome import RunOutcome, run_outcome
from moepp_megatron.tools.experiments.pilot.result import Arm
from moepp_megatron.tools.experiments.runner import (
    RunFailed,
    Trial,
    differences,
    other_settings,
    writing,
)
from moepp_megatron.training.run_folder import refuse_running

# Sections that say where a run is, not what it does.
_ELSEWHERE = {"run", "slurm"}
# Steps of each model in a session; each round begins with the other one.
_ROUNDS = 20
# A share of exactly 1 has no tau.
_LARGEST_TAU = 10.0


@dataclass(frozen=True)
class PilotRun(Trial[RunOutcome]):
    """One arm with one seed; finished when its last step has a validation loss.

    Attributes:
        arm: The model.
        seed: The seed of initial weights and of the order of the data.
        config: Its complete configuration.
    """

    arm: Arm
    seed: int
    config: Config

    @staticmethod
    def of(folder: Path, nproc: int, arm: PilotArm, seed: int) -> PilotRun:
        """The run of an arm with a seed; `folder` is absolute."""
        name = run_name(arm.arm, seed)
        config = with_overrides(arm.config, [f"training.seed={seed}"])
        run = config.run.model_copy(update={"dir": folder / "runs" / name, "name": name})
        # The files are for other folders to start from, too.
        config = config.model_copy(update={"run": run, "data": with_whole_paths(config.data)})
        title = f"seed {seed}, {arm.arm.name}"
        return PilotRun(folder, name, title, nproc, arm.arm, seed, config)

    @property
    def work(self) -> int:
        """The steps of the run."""
        return self.config.training.train_iters

    @property
    def config_file(self) -> Path:
        """The file of its configuration."""
        return self.folder / "configs" / f"{self.name}.yaml"

    @property
    def command(self) -> list[str]:
        """Train."""
        return ["train", "--", str(self.config_file)]

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
        if last.step < self.config.training.train_iters or last.valid_loss is None:
            return None
        if not math.isfinite(last.valid_loss):
            raise RunFailed(
                f"run {self.name} has diverged: its validation loss is {last.valid_loss}; look at "
                f"{folder}, or lower optimizer.lr"
            )
        return run_outcome(records)

    def began(self) -> str:
        """Day of its start, ISO date: a run writes its configuration when it starts."""
        seconds = (self.config.run.dir / CONFIG_FILE).stat().st_mtime
        return printable_time(seconds, "%Y-%m-%d")

    def refuse_other_settings(self) -> None:
        """Raises ConfigError if the run's folder is that of a run with other settings."""
        file = self.config.run.dir / CONFIG_FILE
        try:
            found = _content(load_config(file)) if file.exists() else None
        except ConfigError:
            # Half of it, or of another version: whatever it was, it is done anew if unfinished.
            found = None
            if self.result() is not None:
                raise other_settings(self.folder, f"{file} cannot be read") from None
        wanted = _content(self.config)
        if found is not None and found != wanted:
            changed = [f"{name} ({how})" for name, how in differences(found, wanted).items()]
            what = f"{', '.join(changed[:3])} differs in {file.parent.name}"
            raise other_settings(self.folder, what)


def claim(folder: Path, runs: Sequence[PilotRun]) -> None:
    """Make the pilot's folder and write the configuration of every run.

    Raises:
        ConfigError: It holds a run with other settings, or cannot be written.
    """
    for run in runs:
        run.refuse_other_settings()
    with writing(folder, "configs", "runs", "logs", "speed"):
        for run in runs:
            write_atomic(run.config_file, run.config.to_yaml(run.title).encode())


@dataclass(frozen=True)
class Session(Trial[float]):
    """A session that times MoE++ against vanilla: both models in one process, in turn.

    A machine is faster or slower from one process to the next, by a few per cent. Arms that run
    one after the other take that for a difference between them. Here both see the same machine,
    and the interval is over sessions.

    Attributes:
        arm: MoE++.
        share: Share of its selections that goes to FFN experts, at which its routing is held.
    """

    arm: PilotArm
    share: float

    @staticmethod
    def of(folder: Path, nproc: int, arm: PilotArm, share: float, number: int) -> Session:
        """Session `number`, from 1; `folder` is absolute."""
        name = run_name(arm.arm, number).replace("-seed-", "-session-")
        return Session(folder, name, f"speed, session {number}", nproc, arm, share)

    @property
    def file(self) -> Path:
        """The file of its result."""
        return self.folder / "speed" / f"{self.name}.json"

    @property
    def command(self) -> list[str]:
        """Time it."""
        config = self.arm.config
        # The command starts the ranks itself only where it is typed by hand.
        file = self.folder / "configs" / f"{run_name(self.arm.arm, config.training.seed)}.yaml"
        options = ["--rounds", str(_ROUNDS), "--json", str(self.file)]
        return ["bench", "step", str(file), *_held_at(config, self.share), *options]

    def result(self) -> float | None:
        """Logarithm of MoE++'s step time over vanilla's."""
        try:
            speedup = json.loads(self.file.read_bytes())["speedup"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        is_number = isinstance(speedup, float) and 0 < speedup < math.inf
        return -math.log(speedup) if is_number else None


def run_name(arm: Arm, seed: int) -> str:
    """The name of the files of an arm's run with this seed."""
    words = arm.name.lower().replace("++", "pp").replace("%", "-percent").replace("'", "")
    return re.sub(r"[^a-z0-9.]+", "-", f"{words}-seed-{seed}")


def _content(config: Config) -> dict[str, Any]:
    content = config.model_dump(mode="json")
    return {section: keys for section, keys in content.items() if section not in _ELSEWHERE}


def _held_at(config: Config, share: float) -> list[str]:
    """Settings under which a perfect balance has this FFN share; a budget has its own and goes."""
    moe = config.moe
    settings = [f"moe.tau={moe.tau_for(min(share, moe.phi(_LARGEST_TAU))):.6g}"]
    if moe.budget.target_ffn_per_token is not None or moe.budget.start_ffn_per_token is not None:
        settings += [
            "moe.budget.target_ffn_per_token=null",
            "moe.budget.start_ffn_per_token=null",
            "moe.budget.controller=none",
        ]
    return settings
