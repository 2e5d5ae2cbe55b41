"""The folder of a scaling test: what is finished stays finished, whatever happens to the rest.

DIR/settings.json      what all points have in common
DIR/points/NAME.json   one finished or failed point
DIR/logs/NAME.log      what its ranks printed
DIR/scale.json         the records of all finished points
DIR/scaling.html       the page
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moepp_megatron.config import Config, ConfigError
from moepp_megatron.config.json_file import read_json
from moepp_megatron.observe.atomic import write_atomic
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
# How a rank says why it fails; the launcher looks for it in the log.
FAILURE_MARK = "moepp: point failed on rank"


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


class ScalingFolder:
    """The points on disk.

    Args:
        path: DIR.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def claim(self, config: Config, measuring: Measuring) -> None:
        """Make the folder, or make sure that its points belong to the same test.

        Raises:
            ConfigError: If they do not, or the folder cannot be written.
        """
        wanted = _settings(config, measuring)
        file = self.path / "settings.json"
        try:
            for name in ("points", "logs"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
            found = read_json(file) if file.exists() else None
            if found is None:
                write_atomic(file, (json.dumps(wanted, indent=1) + "\n").encode())
        except OSError as error:
            raise ConfigError(
                f"--out ({self.path}) must be a folder that can be written ({error.strerror}); "
                "choose another one"
            ) from None
        except ValueError:
            found = {}
        if found is not None and found != wanted:
            changed = ", ".join(_differences(found, wanted)[:3])
            raise ConfigError(
                f"--out ({self.path}) must be new or hold points of the same settings, and "
                f"{changed} differs; choose another folder"
            )

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

    def finish(self, point: Point, result: PointResult) -> None:
        """Write down what was measured, in one step."""
        self._write(point, PointFile(name=point.name, status="done", result=result))

    def fail(self, point: Point, error: str) -> None:
        """Write down why `point` failed; it is measured again next time."""
        self._write(point, PointFile(name=point.name, status="failed", error=error))

    def log(self, point: Point, node: int = 0) -> Path:
        """The file of the output of machine `node`'s ranks."""
        suffix = f".node{node}" if node else ""
        return self.path / "logs" / f"{point.name}{suffix}.log"

    def _file(self, point: Point) -> Path:
        return self.path / "points" / f"{point.name}.json"

    def _write(self, point: Point, content: PointFile) -> None:
        write_atomic(self._file(point), (content.model_dump_json(indent=1) + "\n").encode())


def failure_reason(log: Path, status: int) -> str:
    """Why the job with this `log` ended with `status`, on one line."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    # The first rank to fail is the cause of the others' failures.
    for pattern in (rf"{FAILURE_MARK} (.*)", r"^error: (.*)", r"(Signal \d+ \(SIG\w+\))"):
        found = re.search(pattern, text, re.MULTILINE)
        if found is not None:
            said = found.group(1).strip()
            return f"rank {said}" if pattern.startswith(FAILURE_MARK) else said
    return f"exit status {status}; {log} may say more"


def unfinished(folder: ScalingFolder, points: Iterable[Point]) -> list[Point]:
    """The points to measure: those never started and those that failed."""
    return [point for point in points if not folder.is_done(point)]


def _settings(config: Config, measuring: Measuring) -> dict[str, Any]:
    sections = {
        section: {k: v for k, v in keys.items() if k not in _IN_NAME.get(section, ())}
        for section, keys in config.model_dump(mode="json").items()
        if section not in _ELSEWHERE
    }
    # As JSON has it, to be compared with what was read.
    settings: dict[str, Any] = json.loads(json.dumps({**sections, "measuring": asdict(measuring)}))
    return settings


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Dotted names of the settings that differ."""
    names = []
    for section, keys in wanted.items():
        before = found.get(section)
        if not isinstance(before, dict) or not isinstance(keys, dict):
            names.append(section)
            continue
        names += [f"{section}.{key}" for key in keys if before.get(key) != keys[key]]
    return names or ["settings.json"]
