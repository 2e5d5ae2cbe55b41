"""Peak memory and launches of every shipped configuration at full size, played.

python -m tests.fake_gpu.peaks [NAME...]         the tables of docs/gpu.md; some minutes
python -m tests.fake_gpu.peaks --parts NAME      the largest tensors at a peak
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepp_megatron.config.hardware import load_hardware
from moepp_megatron.workbench.planning.efficiency import DEFAULT
from tests.fake_gpu import build, cases

GIB = 2**30


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
        launches: Kernels of the step.
        layers: MoE layers times micro-batches of it.
        parts: The largest tensors at the peak.
    """

    name: str
    ranks: int
    rank: int
    planned: float
    played: int
    local: int | None
    launches: int
    layers: int
    parts: dict[str, int]

    @property
    def fits(self) -> bool:
        """Whether it fits an H100, by the planner's rule, with what is played for the estimate."""
        gpu = load_hardware("h100_sxm")
        needed = self.played + DEFAULT.reserved_gib * GIB
        return needed <= gpu.memory_bytes * (1.0 - DEFAULT.memory_margin)

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


def peaks(folder: Path, paths: list[Path]) -> Iterator[Peak]:
    """Play each; with the stand-in of Transformer Engine, whose modules the planner knows.

    Args:
        folder: Where `build.build` has put the libraries.
        paths: Files of configurations.
    """
    for path in paths:
        case, memory = cases.whole(path)
        (found,) = build.play(folder, [case], transformer_engine=True)
        assert found["error"] == "", f"{case}\n{found['error']}"
        assert found["faults"] == [], case
        yield Peak(
            name=path.stem,
            ranks=case["world_size"],
            rank=case["rank"],
            planned=memory.total,
            played=found["peak"],
            local=_local_peak(folder, path, case),
            launches=found["operations"] + sum(found["launches"].values()),
            layers=found["layers"],
            parts=found["parts"],
        )


def _local_peak(folder: Path, path: Path, case: dict[str, Any]) -> int | None:
    if cases.needs_engine(path):
        return None
    (found,) = build.play(folder, [case])
    assert found["error"] == "", f"{case}\n{found['error']}"
    return int(found["peak"])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--parts", action="store_true")
    arguments = parser.parse_args()
    paths = [
        path
        for path in (*cases.MODELS, *cases.PLANNED)
        if not arguments.names or path.stem in arguments.names
    ]
    print("| configuration | rank | played | planned | ratio | played without TE |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        build.build(Path(folder))
        for peak in peaks(Path(folder), paths):
            print(peak.row(), flush=True)
            for name, size in peak.parts.items() if arguments.parts else ():
                print(f"    {size / GIB:.3f} {name}")


if __name__ == "__main__":
    main()
