"""Sets of training runs; each is a `moepp train` with a configuration file of its own.

DIR/configs/NAME.yaml  the resolved configuration of a run, for `moepp train` or `moepp slurm`
DIR/runs/NAME/         the run's own folder
DIR/logs/NAME.log      what its ranks have printed, if this machine has started them
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepp_megatron.config import Config, ConfigError, load_config
from moepp_megatron.config.blends import with_whole_paths
from moepp_megatron.file_names import CONFIG_FILE, METRICS_FILE
from moepp_megatron.observe.metrics import MetricsError, StepMetrics, read_metrics
from moepp_megatron.runtime.atomic import write_atomic
from moepp_megatron.runtime.launch import LaunchOptions
from moepp_megatron.training.run_folder import refuse_running
from moepp_megatron.workbench.experiments.runs import RunFailed, RunSet, differences

# Sections that say where a run is, not what it does.
_ELSEWHERE = {"run", "slurm"}


@dataclass(frozen=True)
class TrainingRun:
    """One run.

    Attributes:
        name: The name of its files.
        title: What it is, for people.
        config: Its complete configuration.
    """

    name: str
    title: str
    config: Config


class TrainingRuns[Run: TrainingRun](RunSet[Run]):
    """The runs on disk; a run is finished when its last step has a validation loss.

    Args:
        path: DIR, absolute.
        nproc: Ranks of each run.
    """

    parts = ("configs", "runs", "logs")

    def __init__(self, path: Path, nproc: int = 1) -> None:
        super().__init__(path)
        self.nproc = nproc

    def placed(self, name: str, config: Config) -> Config:
        """The configuration of the run `name` of this set."""
        run = config.run.model_copy(update={"dir": self.path / "runs" / name, "name": name})
        # The files are for other folders to start from, too.
        return config.model_copy(update={"run": run, "data": with_whole_paths(config.data)})

    def claim(self, runs: Sequence[Run]) -> None:
        """Make the folder and write the configuration of every run.

        Raises:
            ConfigError: It holds a run with other settings, or cannot be written.
        """
        for run in runs:
            self._refuse_other_settings(run)
        with self.writing():
            for run in runs:
                write_atomic(self.config_file(run), run.config.to_yaml(run.title).encode())

    def title(self, run: Run) -> str:
        """The title that the run has."""
        return run.title

    def work(self, run: Run) -> int:
        """The steps of the run."""
        return run.config.training.train_iters

    def config_file(self, run: Run) -> Path:
        """The file of its configuration."""
        return self.path / "configs" / f"{run.name}.yaml"

    def records(self, run: Run) -> list[StepMetrics] | None:
        """What a finished run has logged; None where it is not finished.

        Raises:
            RunFailed: It is finished and has no validation loss to compare.
        """
        folder = run.config.run.dir
        try:
            records = read_metrics(folder / METRICS_FILE)
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

    def is_done(self, run: Run) -> bool:
        """Whether the run is finished."""
        return self.records(run) is not None

    def do(self, run: Run) -> None:
        """Train; what an interrupted run has left is removed.

        Raises:
            Interrupted: Stopped from outside.
            RunFailed: It failed, or diverged.
            ConfigError: Somebody else is doing it now.
        """
        refuse_running(Path(run.config.run.dir))
        shutil.rmtree(run.config.run.dir, ignore_errors=True)
        log = self.log(run)
        options = LaunchOptions(self.nproc, output=log)
        reason = self.launch(run, options, ["train", "--", str(self.config_file(run))])
        if reason is not None:
            see = "" if str(log) in reason else f"; see {log}"
            raise RunFailed(f"run {run.name} failed: {reason}{see}")
        if not self.is_done(run):
            raise RunFailed(f"run {run.name} ended without a validation loss; see {log}")

    def _refuse_other_settings(self, run: Run) -> None:
        file = run.config.run.dir / CONFIG_FILE
        try:
            found = _content(load_config(file)) if file.exists() else None
        except ConfigError:
            # Half of it, or of another version: whatever it was, it is done anew if unfinished.
            found = None
            if self.is_done(run):
                raise self.other_settings(f"{file} cannot be read") from None
        wanted = _content(run.config)
        if found is not None and found != wanted:
            changed = [f"{name} ({how})" for name, how in differences(found, wanted).items()]
            raise self.other_settings(f"{', '.join(changed[:3])} differs in {file.parent.name}")


def _content(config: Config) -> dict[str, Any]:
    content = config.model_dump(mode="json")
    return {section: keys for section, keys in content.items() if section not in _ELSEWHERE}
