"""Peak memory and launches of every shipped configuration at full size, played.

python -m tests.fake_gpu.peaks [NAME...]         memory, as in docs/gpu.md; some minutes
python -m tests.fake_gpu.peaks --parts NAME      and the largest tensors at the peak
python -m tests.fake_gpu.peaks --launches        kernels of a layer and micro-batch
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
        parts: The largest tensors at the peak.
    """

    name: str
    ranks: int
    rank: int
    planned: float
    played: int
    local: int | None
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
            parts=found["parts"],
        )


def _local_peak(folder: Path, path: Path, case: dict[str, Any]) -> int | None:
    if cases.needs_engine(path):
        return None
    (found,) = build.play(folder, [case])
    assert found["error"] == "", f"{case}\n{found['error']}"
    return int(found["peak"])


def launches(folder: Path, path: Path, transformer_engine: bool) -> int:
    """Kernels that an MoE layer starts for a micro-batch, forward and backward.

    The difference between three layers and two.
    """
    plays = [cases.shipped(path, layers) for layers in (2, 3)]
    found = build.play(folder, plays, transformer_engine)
    for outcome in found:
        assert outcome["error"] == "", outcome["error"]
    few, more = found
    return round((more["kernels"] - few["kernels"]) / (more["layers"] - few["layers"]))


def _print_launches(folder: Path, paths: list[Path]) -> None:
    print("| configuration | without TE | with its stand-in |")
    print("|---|---|---|")
    for path in paths:
        local = "-" if cases.needs_engine(path) else launches(folder, path, False)
        print(f"| {path.stem} | {local} | {launches(folder, path, True)} |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--launches", action="store_true")
    arguments = parser.parse_args()
    paths = [
        path
        for path in (*cases.MODELS, *cases.PLANNED)
        if not arguments.names or path.stem in arguments.names
    ]
    with tempfile.TemporaryDirectory() as folder:
        build.build(Path(folder))
        if arguments.launches:
            _print_launches(Path(folder), [path for path in paths if path in cases.MODELS])
        else:
            _print_peaks(Path(folder), paths, arguments.parts)


def _print_peaks(folder: Path, paths: list[Path], parts: bool) -> None:
    print("| configuration | rank | played | planned | ratio | played without TE |")
    print("|---|---|---|---|---|---|")
    for peak in peaks(folder, paths):
        print(peak.row(), flush=True)
        for name, size in peak.parts.items() if parts else ():
            print(f"    {size / GIB:.3f} {name}")


if __name__ == "__main__":
    main()
