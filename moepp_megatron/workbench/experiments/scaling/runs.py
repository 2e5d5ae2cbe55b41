"""The points of a scaling test on disk, each measured by a job of its own.

DIR/settings.json      what all points have in common
DIR/points/NAME.json   one finished or failed point
DIR/logs/NAME.log      what its ranks printed
DIR/scale.json         the records of all finished points
DIR/scaling.html       the page
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moepp_megatron.config import Config, ConfigError
from moepp_megatron.config.json_file import read_json
from moepp_megatron.runtime.atomic import write_atomic
from moepp_megatron.runtime.launch import LaunchOptions
from moepp_megatron.runtime.nodes import Nodes
from moepp_megatron.workbench.experiments.runs import RunSet, differences
from moepp_megatron.workbench.experiments.scaling.grid import Point
from moepp_megatron.workbench.experiments.scaling.point import PointFile, PointResult

# Sections that say nothing about speed: two runs that differ here are the same test.
_ELSEWHERE = {"run", "data", "checkpoint", "slurm", "telemetry", "observe"}
# Settings that a point's name holds.
_IN_NAME = {
    "parallel": {
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
        # Follows from the first.
        "sequence_parallel",
    },
    "training": {"global_batch_size", "train_iters"},
}


@dataclass(frozen=True)
class Measuring:
    """How each point is measured.

    Attributes:
        kinds: "moepp", "vanilla" or both.
        warmup: Steps of each model before the clock runs.
        steps: Steps of a repetition.
        repeats: Repetitions; the models take turns.
    """

    kinds: tuple[str, ...]
    warmup: int
    steps: int
    repeats: int


class ScalingRuns(RunSet[Point]):
    """The points on disk.

    Args:
        path: DIR.
        command: `moepp` arguments that measure a point as one rank, but for `--point NAME`.
    """

    noun = "points"
    parts = ("points", "logs")

    def __init__(self, path: Path, command: Sequence[str] = ()) -> None:
        super().__init__(path)
        self.command = command

    def claim(self, config: Config, measuring: Measuring) -> None:
        """Make the folder, or make sure that its points belong to the same test.

        Raises:
            ConfigError: If they do not, or the folder cannot be written.
        """
        wanted = _settings(config, measuring)
        file = self.path / "settings.json"
        with self.writing():
            if not file.exists():
                write_atomic(file, (json.dumps(wanted, indent=1) + "\n").encode())
            try:
                found = read_json(file)
            except ValueError:
                found = None
        if found != wanted:
            # A file that is none of ours differs in every section.
            known = found if isinstance(found, dict) else {}
            changed = list(differences(known, wanted)) or [file.name]
            raise self.other_settings(f"{', '.join(changed[:3])} differs")

    def do(self, point: Point, nodes: Nodes | None = None) -> str | None:
        """Measure one point; the ranks of this machine are started here.

        Args:
            point: What to measure.
            nodes: The machines, each of which makes this call; None for this one alone.

        Returns:
            Why it failed, or None.

        Raises:
            Interrupted: Stopped from outside.
            ConfigError: The ranks cannot be shared out over the machines.
        """
        count = nodes.count if nodes is not None else 1
        if point.nproc % count:
            raise ConfigError(
                f"--nnodes ({count}) must divide the ranks of --point ({point.nproc}); use 1"
            )
        node = (nodes.rank or 0) if nodes is not None else 0
        log = self.log(point)
        if node:
            log = log.with_name(f"{point.name}.node{node}.log")
        options = LaunchOptions(point.nproc // count, nodes, output=log)
        reason = self.launch(point, options, [*self.command, "--point", point.name])
        if reason is not None and node == 0:
            self._write(point, PointFile(name=point.name, status="failed", error=reason))
        return reason

    def finish(self, point: Point, result: PointResult) -> None:
        """Write down what was measured, in one step."""
        self._write(point, PointFile(name=point.name, status="done", result=result))

    def read(self, point: Point) -> PointFile | None:
        """The file of `point`; None if there is none that can be read."""
        try:
            text = self._file(point).read_text(encoding="utf-8")
            return PointFile.model_validate_json(text)
        except (OSError, ValidationError):
            return None

    def is_done(self, point: Point) -> bool:
        """Whether `point` has been measured."""
        file = self.read(point)
        return file is not None and file.status == "done"

    def _file(self, point: Point) -> Path:
        return self.path / "points" / f"{point.name}.json"

    def _write(self, point: Point, content: PointFile) -> None:
        write_atomic(self._file(point), (content.model_dump_json(indent=1) + "\n").encode())


def _settings(config: Config, measuring: Measuring) -> dict[str, Any]:
    sections = {
        section: {k: v for k, v in keys.items() if k not in _IN_NAME.get(section, ())}
        for section, keys in config.model_dump(mode="json").items()
        if section not in _ELSEWHERE
    }
    # As JSON has it, to be compared with what was read.
    settings: dict[str, Any] = json.loads(json.dumps({**sections, "measuring": asdict(measuring)}))
    return settings
