"""The points of a scaling test as trials, each measured by a job of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moepp_megatron.config import Config
from moepp_megatron.config.json_file import read_json
from moepp_megatron.runtime.atomic import write_atomic
from moepp_megatron.tools.experiments.runner import Trial, check_settings, writing
from moepp_megatron.tools.experiments.scaling.grid import DEGREES, Point
from moepp_megatron.tools.experiments.scaling.records import PointFile, PointResult

# Sections that say nothing about speed: two runs that differ here are the same test.
_ELSEWHERE = {"run", "data", "checkpoint", "slurm", "telemetry", "observe"}
# Settings that a point's name holds.
_IN_NAME = {
    # The last one follows from the first.
    "parallel": {*DEGREES.values(), "sequence_parallel"},
    "training": {"global_batch_size", "train_iters"},
}


@dataclass(frozen=True)
class Measuring:
    """Timing of each point.

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


@dataclass(frozen=True)
class PointTrial(Trial[PointResult]):
    """A point, measured by `moepp scale --point`."""

    point: Point

    @staticmethod
    def of(folder: Path, point: Point, words: Sequence[str] = ()) -> PointTrial:
        """The trial of a point; `words` measure one as a rank, but for its name."""
        command = [*words, "--point", point.name]
        return PointTrial(folder, point.name, point.name, point.nproc, command, point)

    def read(self) -> PointFile | None:
        """The point's file; None if there is none that can be read."""
        try:
            text = self._file.read_text(encoding="utf-8")
            return PointFile.model_validate_json(text)
        except (OSError, ValidationError):
            return None

    def result(self) -> PointResult | None:
        """Return the result."""
        file = self.read()
        return None if file is None else file.result

    def finish(self, result: PointResult) -> None:
        """Write down what was measured, in one step."""
        self._write(PointFile(name=self.name, status="done", result=result))

    def fail(self, reason: str) -> None:
        """Write down why it failed; the other points are measured all the same."""
        self._write(PointFile(name=self.name, status="failed", error=reason))

    @property
    def _file(self) -> Path:
        return self.folder / "points" / f"{self.name}.json"

    def _write(self, content: PointFile) -> None:
        write_atomic(self._file, (content.model_dump_json(indent=1) + "\n").encode())


def claim(folder: Path, config: Config, measuring: Measuring) -> None:
    """Make the folder, or make sure that its points belong to the same test.

    Raises:
        ConfigError: If they do not, or the folder cannot be written.
    """
    wanted = _settings(config, measuring)
    file = folder / "settings.json"
    with writing(folder, "points", "logs"):
        if not file.exists():
            write_atomic(file, (json.dumps(wanted, indent=1) + "\n").encode())
        try:
            found = read_json(file)
        except ValueError:
            found = None
    check_settings(folder, file, found if isinstance(found, dict) else {}, wanted)


def _settings(config: Config, measuring: Measuring) -> dict[str, Any]:
    sections = {
        section: {k: v for k, v in keys.items() if k not in _IN_NAME.get(section, ())}
        for section, keys in config.model_dump(mode="json").items()
        if section not in _ELSEWHERE
    }
    # As JSON has it, to be compared with what was read.
    settings: dict[str, Any] = json.loads(json.dumps({**sections, "measuring": asdict(measuring)}))
    return settings
