"""Peak memory and kernels of shipped configurations, played: the numbers of docs/gpu.md.

The slow tests print them: `./launch/test.sh -s -m slow tests/fake_gpu`.
"""

from dataclasses import dataclass

from moepp_megatron.config.hardware import load_hardware
from moepp_megatron.tools.planning.machine import DEFAULT
from tests.fake_gpu import build, cases, record
from tests.fake_gpu.real_packages import pinned_engine

GIB = 2**30
OWNERS = (*record.OWNERS.values(), "autograd")


@dataclass(frozen=True)
class Peak:
    """A configuration on its fullest rank.

    Attributes:
        name: Of its file.
        ranks: GPUs.
        rank: The one that was played.
        planned: Bytes by the planner's estimate.
        played: The most bytes of tensors in a step.
    """

    name: str
    ranks: int
    rank: int
    planned: float
    played: int

    @property
    def fits(self):
        """True if it fits an H100 by the planner's rule, with the played peak as the estimate."""
        room = load_hardware("h100_sxm").memory_bytes
        assert room is not None, "an H100's memory is known"
        return self.played + DEFAULT.reserved_gib * GIB <= room * (1.0 - DEFAULT.memory_margin)

    @property
    def ratio(self):
        """Return the planned bytes over the played ones."""
        return self.planned / self.played

    def row(self):
        """A row of the table."""
        return (
            f"| {self.name} | {self.rank} of {self.ranks} | {self.played / GIB:.1f} | "
            f"{self.planned / GIB:.1f} | {self.ratio:.2f} |"
        )


def peaks(folder, paths):
    """Play each with Transformer Engine, whose modules the planner knows.

    Args:
        folder: Where `build.build` has put the libraries.
        paths: Files of configurations.
    """
    played = played_bytes(folder, paths, pinned_engine())
    found = []
    for path in paths:
        case, memory = cases.whole(path)
        size, rank = case["world_size"], case["rank"]
        found.append(Peak(path.stem, size, rank, memory.total, played[path]))
    return found


def played_bytes(folder, paths, engine):
    """The peak of each configuration, from two and three layers a stage and their difference.

    Every further layer takes the same: `test_two_layers_and_a_difference_are_the_whole`. Stages
    that differ from each other are played as they are.
    """
    layers = {path: cases.stage_layers_of(path) for path in paths}
    plays = {
        (path, few): cases.whole(path, layers=few)[0]
        for path in paths
        for few in ((None,) if layers[path] is None else (2, 3))
    }
    outcomes = build.play(folder, list(plays.values()), engine)
    found = {}
    for (key, case), outcome in zip(plays.items(), outcomes, strict=True):
        assert outcome["error"] == "", f"{case}\n{outcome['error']}"
        assert outcome["faults"] == [], case
        found[key] = outcome["peak"]
    return {
        path: found[path, None]
        if count is None
        else found[path, 2] + (count - 2) * (found[path, 3] - found[path, 2])
        for path, count in layers.items()
    }


def launches(folder, path, engine, *changes):
    """Kernels that an MoE layer starts for a micro-batch, forward and backward, by `OWNERS`.

    The difference between three layers and two. A grouped product counts once.
    """
    plays = [cases.shipped(path, layers, *changes) for layers in (2, 3)]
    found = build.play(folder, plays, engine)
    for outcome in found:
        assert outcome["error"] == "", outcome["error"]
    few, more = found
    layers = more["layers"] - few["layers"]
    return {
        name: round((more["owners"].get(name, 0) - few["owners"].get(name, 0)) / layers)
        for name in OWNERS
    }
