"""The runs of a pilot and their folder: what is finished stays finished.

DIR/configs/NAME.yaml  the resolved configuration of a run, for `moepp train` or `moepp slurm`
DIR/runs/NAME/         the run's own folder
DIR/logs/NAME.log      what its ranks printed, where the pilot has started them
DIR/pilot.json         what was found
DIR/pilot.html         the page
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepp_megatron.config import Config, ConfigError, load_config, with_overrides
from moepp_megatron.observe.atomic import write_atomic
from moepp_megatron.observe.metrics import MetricsError, StepMetrics, read_metrics
from moepp_megatron.workbench.experiments.pilot.arms import PilotArm
from moepp_megatron.workbench.experiments.pilot.result import Arm

# Sections that say where a run is, not what it does.
_ELSEWHERE = {"run", "slurm"}


class RunFailed(Exception):
    """A run has ended without a result; the message names it and what to read."""


@dataclass(frozen=True)
class PilotRun:
    """One arm with one seed.

    Attributes:
        arm: The arm.
        seed: Seed of initial weights and of the order of the data.
        config: Complete configuration.
    """

    arm: Arm
    seed: int
    config: Config

    @property
    def name(self) -> str:
        """Name of its files."""
        return run_name(self.arm, self.seed)


def run_name(arm: Arm, seed: int) -> str:
    """Name of the files of an arm's run with this seed."""
    words = arm.name.lower().replace("++", "pp").replace("%", "-percent")
    return re.sub(r"[^a-z0-9.]+", "-", f"{words}-seed-{seed}")


class PilotFolder:
    """The runs on disk.

    Args:
        path: DIR, absolute.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def run_of(self, arm: PilotArm, seed: int) -> PilotRun:
        """The run of an arm with a seed, in this folder."""
        unplaced = PilotRun(arm.arm, seed, arm.config)
        run_dir = self.path / "runs" / unplaced.name
        config = with_overrides(arm.config, [f"training.seed={seed}"])
        run = config.run.model_copy(update={"dir": run_dir, "name": unplaced.name})
        # The files are for other folders to start from, too.
        paths = {"path": config.data.path, "tokenizer": config.data.tokenizer}
        absolute = {key: path and path.resolve() for key, path in paths.items()}
        data = config.data.model_copy(update=absolute)
        return PilotRun(arm.arm, seed, config.model_copy(update={"run": run, "data": data}))

    def claim(self, runs: Sequence[PilotRun]) -> None:
        """Make the folder and write the configuration of every run.

        Raises:
            ConfigError: If it holds a run with other settings, or cannot be written.
        """
        for run in runs:
            self._refuse_other_settings(run)
        try:
            for name in ("configs", "runs", "logs"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
            for run in runs:
                comment = f"{run.arm.name}, seed {run.seed}"
                write_atomic(self.config_file(run), run.config.to_yaml(comment).encode())
        except OSError as error:
            raise ConfigError(
                f"--out ({self.path}) must be a folder that can be written ({error.strerror}); "
                "choose another one"
            ) from None

    def config_file(self, run: PilotRun) -> Path:
        """The file of its configuration."""
        return self.path / "configs" / f"{run.name}.yaml"

    def log(self, run: PilotRun) -> Path:
        """The file of its ranks' output."""
        return self.path / "logs" / f"{run.name}.log"

    def records(self, run: PilotRun) -> list[StepMetrics] | None:
        """The records of a finished run; None if it is not finished.

        Raises:
            RunFailed: If it is finished and has no validation loss to compare.
        """
        folder = run.config.run.dir
        try:
            records = read_metrics(folder / "metrics.jsonl")
        except MetricsError:
            return None
        last = records[-1]
        if last.step < run.config.training.train_iters or last.valid_loss is None:
            return None
        if not math.isfinite(last.valid_loss):
            raise RunFailed(
                f"run {run.name} has diverged: its validation loss is {last.valid_loss}; look at "
                f"{folder}, or lower optimizer.lr"
            )
        return records

    def is_done(self, run: PilotRun) -> bool:
        """Whether the run is finished."""
        return self.records(run) is not None

    def _refuse_other_settings(self, run: PilotRun) -> None:
        file = run.config.run.dir / "config.yaml"
        try:
            found = _content(load_config(file)) if file.exists() else None
        except ConfigError:
            # Half of it, or of another version: whatever it was, it is done anew if unfinished.
            found = None
            if self.is_done(run):
                raise ConfigError(
                    f"--out ({self.path}) must be new or hold runs of the same settings, and "
                    f"{file} cannot be read; choose another folder"
                ) from None
        if found is not None and found != _content(run.config):
            changed = ", ".join(_differences(found, _content(run.config))[:3])
            raise ConfigError(
                f"--out ({self.path}) must be new or hold runs of the same settings, and "
                f"{changed} differs in {file.parent.name}; choose another folder"
            )


def ordered_runs(
    folder: PilotFolder, arms: Sequence[PilotArm], seeds: Sequence[int]
) -> list[PilotRun]:
    """All runs, seed by seed; each seed begins with another arm.

    A machine that gets slower or faster in the meantime then favours no arm.
    """
    runs = []
    for index, seed in enumerate(seeds):
        turn = index % len(arms)
        runs += [folder.run_of(arm, seed) for arm in [*arms[turn:], *arms[:turn]]]
    return runs


def _content(config: Config) -> dict[str, Any]:
    content = config.model_dump(mode="json")
    return {section: keys for section, keys in content.items() if section not in _ELSEWHERE}


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Dotted names of the settings that differ."""
    return [
        f"{section}.{key} ({found[section].get(key)}, now {value})"
        for section, keys in wanted.items()
        for key, value in keys.items()
        if found[section].get(key) != value
    ]
