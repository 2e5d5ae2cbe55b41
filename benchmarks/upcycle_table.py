"""Tables (summed up in docs/how_to/upcycle.md) of what `benchmarks.upcycle_recipe` has measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

# Steps of an upcycled model.
AFTER = 200
_SHARE_AT = (5, 10, 20, 50, 100, 200)
_LOSS_AT = (0, 10, 20, 40, 100, 200)


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        part: What it is for: chose or proved.
        family: Of the source model.
        text: Name of the text.
        seed: Of the source's weights and of the order of the text.
        label: What is particular about it; with the others it makes the name.
        settings: Settings that differ; `added` and `residual` are those of the conversion.
    """

    part: str
    family: str
    text: str
    seed: int
    label: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the run and of its file."""
        return f"{self.part}-{self.family}-{self.text}-{self.seed}-{self.label}".replace(" ", "_")


def table(runs: Sequence[Run], out: Path) -> str:
    """All runs that are there, one a row."""
    lines = [
        f"| which | FFN share after {_listed(_SHARE_AT)} steps | least | last 40 steps "
        f"| validation loss after {_listed(_LOSS_AT)} steps |",
        "|---|---|---|---|---|",
    ]
    for run in runs:
        file = out / f"{run.name}.json"
        if file.exists():
            lines.append(_row(run, json.loads(file.read_text())))
    return "\n".join(lines)


def _row(run: Run, record: dict[str, Any]) -> str:
    share = record["share"]
    shares = ", ".join(f"{share[step - 1]:.2f}" for step in _SHARE_AT)
    losses = ", ".join(f"{record['valid'][str(step)]:.3f}" for step in _LOSS_AT)
    return (
        f"| {run.part}: {run.family}, {run.text}, {run.seed}, {run.label} | {shares} "
        f"| {min(share):.2f} | {np.mean(share[-40:]):.3f} | {losses} |"
    )


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(str(step) for step in steps)
