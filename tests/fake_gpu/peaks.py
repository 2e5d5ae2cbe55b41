"""Peak memory and kernels of shipped configurations, played: the tables of docs/gpu.md.

Usage: python -m tests.fake_gpu.peaks [NAME...] for memory, with --launches for kernels.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

from moepp_megatron.config.hardware import load_hardware
from moepp_megatron.tools.planning.machine import DEFAULT
from tests.fake_gpu import build, cases, record
from tests.fake_gpu.real_packages import Engine, pinned_engine

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
        local: The same without Transformer Engine; None where it cannot run so.
    """

    name: str
    ranks: int
    rank: int
    planned: float
    played: int
    local: int | None

    @property
    def fits(self) -> bool:
        """Whether it fits an H100, by the planner's rule, with what is played for the estimate."""
        room = load_hardware("h100_sxm").memory_bytes
        assert room is not None, "an H100's memory is known"
        return self.played + DEFAULT.reserved_gib * GIB <= room * (1.0 - DEFAULT.memory_margin)

    @property
    def ratio(self) -> float:
        """What is planned over what was played."""
        return self.planned / self.played

    def row(self) -> str:
        """A row of the table."""
        local = "-" if self.local is None else f"{self.local / GIB:.1f}"
        return (
            f"| {self.name} | {self.rank} of {self.ranks} | {self.played / GIB:.1f} | "
            f"{self.planned / GIB:.1f} | {self.ratio:.2f} | {local} |"
        )


def peaks(folder: Path, paths: list[Path]) -> list[Peak]:
    """Play each; with Transformer Engine, whose modules the planner knows, and without.

    Args:
        folder: Where `build.build` has put the libraries.
        paths: Files of configurations.
    """
    played = played_bytes(folder, paths, pinned_engine())
    local = played_bytes(folder, [path for path in paths if not cases.needs_engine(path)], None)
    found = []
    for path in paths:
        case, memory = cases.whole(path)
        size, rank = case["world_size"], case["rank"]
        found.append(Peak(path.stem, size, rank, memory.total, played[path], local.get(path)))
    return found


def played_bytes(folder: Path, paths: list[Path], engine: Engine | None) -> dict[Path, int]:
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
    found: dict[tuple[Path, int | None], int] = {}
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


def launches(folder: Path, path: Path, engine: Engine | None, *changes: str) -> dict[str, int]:
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


def main():
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--launches", action="store_true")
    arguments = parser.parse_args()
    every = cases.MODELS if arguments.launches else cases.PLANNED
    paths = [path for path in every if not arguments.names or path.stem in arguments.names]
    with tempfile.TemporaryDirectory() as folder:
        build.build(Path(folder))
        if arguments.launches:
            _print_launches(Path(folder), paths)
        else:
            _print_peaks(Path(folder), paths)


def _print_launches(folder: Path, paths: list[Path]):
    print(f"| configuration | modules | kernels | {' | '.join(OWNERS)} |")
    print("|---|---|---" + "|---" * len(OWNERS) + "|")
    for path in paths:
        for engine in (None, pinned_engine()):
            if engine is None and cases.needs_engine(path):
                continue
            modules = "without TE" if engine is None else "TE"
            for kind, changes in (("MoE++", ()), ("vanilla", cases.VANILLA)):
                found = launches(folder, path, engine, *changes)
                counts = " | ".join(str(found[name]) for name in OWNERS)
                row = f"| {path.stem}, {kind} | {modules} | {sum(found.values())} | {counts} |"
                print(row, flush=True)


def _print_peaks(folder: Path, paths: list[Path]):
    print("| configuration | rank | played | planned | ratio | played without TE |")
    print("|---|---|---|---|---|---|")
    for path in paths:
        for peak in peaks(folder, [path]):
            print(peak.row(), flush=True)


if __name__ == "__main__":
    main()
