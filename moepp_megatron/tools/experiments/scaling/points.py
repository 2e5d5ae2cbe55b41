"""The points of a scaling test: rank counts, layouts and batches that fit together.

Strong scaling keeps the global batch of the configuration at every rank count. Weak scaling keeps
the batch of a rank: `global_batch_size * nproc / smallest nproc`. Where both want the same batch,
as at the smallest count, they are one point.

DIR/points/NAME.json   what `moepp bench step` has measured at a point
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moepp_megatron.config import Config, ConfigError, Layout, with_overrides
from moepp_megatron.config.schema.parallel import DEGREES
from moepp_megatron.tools.experiments.timed_step import TimedStepTrial

MODES = ("strong", "weak")
# Sections that say nothing about speed: two runs that differ here are the same test.
_ELSEWHERE = {"run", "data", "checkpoint", "slurm", "telemetry", "observe"}
# Settings that a point's name holds.
_IN_NAME = {
    # The last one follows from the first.
    "parallel": {*DEGREES.values(), "sequence_parallel"},
    "training": {"global_batch_size", "train_iters"},
}


@dataclass(frozen=True)
class Point:
    """The measurement of one job: ranks of all machines, and sequences per step over all ranks.

    `layout` has degrees of parallelism, such as "tp=1,pp=1,cp=1,ep=2,etp=1"; the point is one of
    the kinds of scaling in `modes`.
    """

    nproc: int
    layout: str
    global_batch_size: int
    modes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """A file name, different for different points, the same for equal ones."""
        degrees = self.layout.replace("=", "").replace(",", "-")
        return f"n{self.nproc}_{degrees}_b{self.global_batch_size}"

    @property
    def overrides(self) -> list[str]:
        """Settings of this point's layout and batch."""
        degrees = _parse_layout(self.layout)
        settings = [f"parallel.{DEGREES[key]}={n}" for key, n in degrees.items()]
        # Steps of one size are compared.
        settings += [
            f"training.global_batch_size={self.global_batch_size}",
            "training.batch_ramp=null",
        ]
        # MoE layers need it with tensor parallelism, and it has no effect without.
        return settings + ["parallel.sequence_parallel=true"] * (degrees["tp"] > 1)

    def trial(self, folder: Path, words: Sequence[str], rounds: int) -> TimedStepTrial:
        """The trial of this point; `words` are the configuration and its overrides."""
        file = folder / "points" / f"{self.name}.json"
        words = [*words, *self.overrides]
        return TimedStepTrial.of(file, self.name, self.nproc, words, rounds)


def _parse_layout(text: str) -> dict[str, int]:
    """Degrees by name from `ep=2,tp=1`; `auto` is empty; ConfigError if malformed or repeated."""
    example = "use for example --layout ep=2,tp=1, or auto"
    degrees: dict[str, int] = {}
    for part in [] if text.strip() == "auto" else text.split(","):
        key, _, number = (piece.strip() for piece in part.partition("="))
        if key not in DEGREES or not (number.isascii() and number.isdigit() and int(number) > 0):
            raise ConfigError(
                f"--layout ({text}) must be auto or {', '.join(DEGREES)} with numbers above 0; "
                f"{example}"
            )
        if key in degrees:
            raise ConfigError(f"--layout ({text}) must name {key} once; {example}")
        degrees[key] = int(number)
    return degrees


def build_points(
    config: Config, nprocs: Sequence[int], layouts: Sequence[str], modes: Sequence[str]
) -> tuple[dict[str, Point], dict[str, str]]:
    """The points of all combinations that fit, by name, and why the others do not.

    Degrees that a layout does not name are the configuration's; expert parallelism is then as wide
    as divides both the experts and the ranks. ConfigError if a layout is malformed or nothing fits.
    """
    wanted = [(text, _parse_layout(text)) for text in layouts]
    points: dict[str, Point] = {}
    impossible: dict[str, str] = {}
    for nproc, (text, degrees), mode in itertools.product(sorted(nprocs), wanted, modes):
        try:
            point = _point(config, nproc, degrees, _batch(config, nproc, min(nprocs), mode))
        except ConfigError as error:
            reason = "; ".join(str(error).splitlines())
            impossible[f"{nproc} ranks, {text}, {mode}"] = reason
            continue
        known = points.get(point.name, point)
        points[point.name] = replace(point, modes=tuple(dict.fromkeys([*known.modes, mode])))
    if not points:
        first, reason = next(iter(impossible.items()))
        raise ConfigError(
            f"--nproc ({', '.join(map(str, nprocs))}) must fit the configuration at one count at "
            f"least; with {first}: {reason}"
        )
    return points, impossible


def _batch(config: Config, nproc: int, smallest: int, mode: str) -> int:
    batch = config.training.global_batch_size
    if mode == "strong":
        return batch
    if batch * nproc % smallest:
        raise ConfigError(
            f"training.global_batch_size ({batch}) must grow in proportion to the ranks, from "
            f"{smallest} to {nproc}; use a multiple of {smallest}"
        )
    return batch * nproc // smallest


def _point(config: Config, nproc: int, degrees: Mapping[str, int], batch: int) -> Point:
    parallel, experts = config.parallel, config.moe.num_ffn_experts
    full = {key: getattr(parallel, name) or 1 for key, name in DEGREES.items()} | dict(degrees)
    if "ep" not in degrees:
        others = full["etp"] * full["pp"]
        fitting = [ep for ep in range(1, experts + 1) if experts % ep == nproc % (ep * others) == 0]
        # Where even 1 does not fit, that is found now.
        full["ep"] = max(fitting, default=1)
    point = Point(nproc, ",".join(f"{key}={full[key]}" for key in DEGREES), batch)
    Layout.from_config(with_overrides(config, point.overrides), nproc)
    return point


def shared_settings(config: Config, rounds: int) -> dict[str, Any]:
    """The settings that all points have in common, by section."""
    shared: dict[str, Any] = {
        section: {k: v for k, v in keys.items() if k not in _IN_NAME.get(section, ())}
        for section, keys in config.model_dump(mode="json").items()
        if section not in _ELSEWHERE
    }
    return {**shared, "measuring": {"rounds": rounds}}
