"""A trial that times MoE++ against vanilla: both models in one process, in turn.

A machine's speed changes by a few per cent from one process to the next; here both see the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, PositiveFloat, ValidationError

from moepp_megatron.tools.experiments.runner import Trial


class BothSteps(BaseModel, frozen=True, allow_inf_nan=False):
    """Both models' steps, of what `tools.bench.step` writes."""

    tokens: int
    vanilla_ms: PositiveFloat
    moepp_ms: PositiveFloat
    speedup: PositiveFloat
    vanilla_a2a_bytes: int
    moepp_a2a_bytes: int
    vanilla_a2a_time_s: float | None = None
    moepp_a2a_time_s: float | None = None


@dataclass(frozen=True)
class TimedStepTrial(Trial[BothSteps]):
    """One start of `moepp bench step`."""

    file: Path

    @classmethod
    def of(
        cls, file: Path, title: str, nproc: int, words: Sequence[str], rounds: int
    ) -> TimedStepTrial:
        """The trial of a configuration and overrides, `words`, with `rounds` steps of each model.

        Its result goes to `file`, in a folder of DIR; people read `title` while it is measured.
        """
        command = ["bench", "step", *words, "--rounds", str(rounds), "--json", str(file)]
        return cls(file.parents[1], file.stem, title, nproc, command, file)

    def result(self) -> BothSteps | None:
        """Return the result."""
        try:
            return BothSteps.model_validate_json(self.file.read_bytes())
        except (OSError, ValidationError):
            return None
