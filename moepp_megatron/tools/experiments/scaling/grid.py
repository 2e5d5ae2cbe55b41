"""The points of a scaling test: rank counts, layouts and batches that fit together.

Strong scaling keeps the global batch of the configuration at every rank count. Weak scaling keeps
the batch of a rank: `global_batch_size * nproc / smallest nproc`. Where both want the same batch,
as at the smallest count, they are one point.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from moepp_megatron.config import Config, ConfigError, Layout, with_overrides
from moepp_megatron.config.schema.parallel import DEGREES

MODES = ("strong", "weak")
KINDS = ("moepp", "vanilla")


@dataclass(frozen=True)
class Point:
    """The measurement of one job.

    Attributes:
        nproc: Ranks, all machines.
        layout: Degrees of parallelism, such as "tp=1,pp=1,cp=1,ep=2,etp=1".
        global_batch_size: Sequences per step, over all ranks.
        modes: The kinds of scaling that it is a point of.
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

    def config(self, config: Config) -> Config:
        """`config` in this point's layout and batch.

        Raises:
            ConfigError: If they do not fit.
        """
        degrees = parse_layout(self.layout)
        overrides = [f"parallel.{DEGREES[key]}={n}" for key, n in degrees.items()]
        overrides += [f"training.global_batch_size={self.global_batch_size}"]
        # Steps of one size are compared.
        overrides += ["training.batch_ramp=null"]
        # MoE layers need it with tensor parallelism, and it has no effect without.
        if degrees["tp"] > 1:
            overrides.append("parallel.sequence_parallel=true")
        return with_overrides(config, overrides)


@dataclass(frozen=True)
class ScalingGrid:
    """Everything that a scaling test asks for.

    Attributes:
        points: Points to measure, by rank count.
        impossible: Requested combinations that do not fit, with the reason in one line.
    """

    points: tuple[Point, ...]
    impossible: dict[str, str]

    def named(self, name: str) -> Point:
        """The point of a name.

        Raises:
            ConfigError: No point has it.
        """
        points = {point.name: point for point in self.points}
        if name not in points:
            raise ConfigError(f"--point ({name}) must be one of {', '.join(points)}")
        return points[name]

    def point_of_ranks(self, name: str | None, world_size: int) -> Point:
        """The point that ranks of an external launcher measure.

        Args:
            name: Its name; None where only one point has as many ranks.
            world_size: How many ranks were started.

        Raises:
            ConfigError: The named point has another number of ranks, or a name is needed.
        """
        if name is not None:
            point = self.named(name)
            if point.nproc != world_size:
                raise ConfigError(
                    f"--point ({name}) must have as many ranks as were started ({world_size}); "
                    f"start {point.nproc}"
                )
            return point
        fitting = [point for point in self.points if point.nproc == world_size]
        if len(fitting) != 1:
            names = ", ".join(point.name for point in fitting) or "none"
            raise ConfigError(
                f"--point (null) must name one of the points of {world_size} ranks: {names}"
            )
        return fitting[0]


def parse_layout(text: str) -> dict[str, int]:
    """Degrees by name from `ep=2,tp=1`; `auto` is empty.

    Raises:
        ConfigError: If it has another form, an unknown name, a name twice, or no number above 0.
    """
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


def build_grid(
    config: Config, nprocs: Sequence[int], layouts: Sequence[str], modes: Sequence[str]
) -> ScalingGrid:
    """The points of all combinations that fit.

    Degrees that a layout does not name are the configuration's; expert parallelism is then as wide
    as divides both the experts and the ranks.

    Args:
        config: Source of the other settings.
        nprocs: Rank counts.
        layouts: Values of `--layout`.
        modes: "strong", "weak".

    Raises:
        ConfigError: If a layout is malformed, or nothing fits.
    """
    wanted = [(text, parse_layout(text)) for text in layouts]
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
        both = tuple(dict.fromkeys([*known.modes, mode]))
        points[point.name] = replace(point, modes=both)
    if not points:
        first, reason = next(iter(impossible.items()))
        raise ConfigError(
            f"--nproc ({', '.join(map(str, nprocs))}) must fit the configuration at one count at "
            f"least; with {first}: {reason}"
        )
    return ScalingGrid(tuple(points.values()), impossible)


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
    parallel = config.parallel
    full = {key: getattr(parallel, name) or 1 for key, name in DEGREES.items()} | dict(degrees)
    if "ep" not in degrees:
        full["ep"] = _widest(config.moe.num_ffn_experts, nproc, full["etp"] * full["pp"])
    layout = ",".join(f"{key}={full[key]}" for key in DEGREES)
    point = Point(nproc, layout, batch)
    Layout.from_config(point.config(config), nproc)
    return point


def _widest(experts: int, nproc: int, others: int) -> int:
    """The largest expert-parallel size; 1 where even that does not fit, which is found later."""
    return max(
        (ep for ep in range(1, experts + 1) if experts % ep == 0 and nproc % (ep * others) == 0),
        default=1,
    )
