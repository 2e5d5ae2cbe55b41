"""Published runs, and how far the model's estimates of a kind of run may be off.

`configs/measured/set_numbers.json` holds the runs by which inputs of the model were set,
`held_out.json` those by which none was.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from moepp_megatron.config import Config
from moepp_megatron.workbench.planning.machine import Machine
from moepp_megatron.workbench.planning.measured.compare import (
    Comparison,
    FamilyErrors,
    compare,
    family_errors,
)
from moepp_megatron.workbench.planning.measured.rows import read_runs

# Beside the package in a source tree, as `configs/hardware` is.
FOLDER = Path(__file__).resolve().parents[4] / "configs" / "measured"
SET_NUMBERS, HELD_OUT = FOLDER / "set_numbers.json", FOLDER / "held_out.json"
# GPUs of which there are runs of MoE models; an H200 is an H100's chip with more memory.
_CARDS = ("h100", "h200", "b200")
# Fewer rows say nothing of a tenth.
_LEAST_ROWS = 4


@dataclass(frozen=True)
class Range:
    """How long runs took, in units of their estimate.

    Attributes:
        family: Published runs that it comes from.
        errors: Their errors.
        is_own: Whether they are of the same kind of GPU as what is estimated.
    """

    family: str
    errors: FamilyErrors
    is_own: bool

    def of(self, time: float) -> tuple[float, float]:
        """What a tenth of such runs took less than, and more than, for this estimate."""
        return time * self.errors.tenth, time * self.errors.nine_tenths


def error_range(config: Config, machine: Machine) -> Range | None:
    """Errors of the held-out published runs nearest to a plan; None if their file is missing.

    These are runs of MoE models on H100 in the same format; on a B200 the runs there.
    """
    by_format = f"{'FP8' if config.precision.fp8 else 'bf16'} MoE"
    card = machine.hardware.name.lower()
    family = "B200" if card.startswith("b200") else by_format
    errors = _errors_by_family().get(family)
    if errors is None or errors.rows < _LEAST_ROWS:
        return None
    return Range(family, errors, card.startswith(_CARDS))


@lru_cache(maxsize=1)
def _errors_by_family() -> dict[str, FamilyErrors]:
    return family_errors(held_out(), scopes=("in", "near")) if HELD_OUT.is_file() else {}


def held_out() -> list[Comparison]:
    """The published runs that set no number, beside the model."""
    return [compare(run) for run in read_runs(HELD_OUT)]


def set_numbers() -> list[Comparison]:
    """The published runs that set numbers, beside the model."""
    return [compare(run) for run in read_runs(SET_NUMBERS)]
