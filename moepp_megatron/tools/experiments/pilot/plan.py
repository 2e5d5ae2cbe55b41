"""The plan that a pilot fixes before any decision: its looks, and the arms matched to MoE++.

DIR/plan.json  written by the first call, completed once MoE++ was timed
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from moepp_megatron.config import ConfigError
from moepp_megatron.runtime.atomic import write_atomic
from moepp_megatron.tools.experiments.pilot.statistics import Estimate

FILE = "plan.json"


class Match(BaseModel):
    """Measurements of MoE++, and the arms that follow.

    Attributes:
        ffn_share: FFN share of its selections, mean over the seeds of the first look.
        log_time_ratio: Logarithm of its step time over vanilla's, mean over sessions.
        error: Standard error of that.
        steps: Its steps in vanilla's time.
        width: Inner width of the experts of the vanilla model with its compute.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    ffn_share: float
    log_time_ratio: float
    error: float
    steps: int
    width: int


class PilotPlan(BaseModel):
    """Pilot plan.

    Attributes:
        first: Seeds of the first look; the k-th look comes after k times as many.
        sessions: Sessions that time MoE++.
        match: Measurements; None before MoE++ was timed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    first: int
    sessions: int
    match: Match | None = None

    @property
    def speed(self) -> Estimate:
        """The logarithm of the time ratio with its uncertainty, once it was measured."""
        assert self.match is not None, "timed before its speed is asked for"
        return Estimate(self.match.log_time_ratio, self.match.error, self.sessions - 1)

    def write(self, folder: Path) -> None:
        """Write the file.

        Raises:
            OSError: If it cannot be written.
        """
        write_atomic(folder / FILE, (self.model_dump_json(indent=1) + "\n").encode())

    @staticmethod
    def claim(folder: Path, wanted: PilotPlan) -> PilotPlan:
        """The plan in force: the folder's own, or else `wanted`, which is written.

        Raises:
            ConfigError: The file is damaged, or of a pilot with another number of sessions.
        """
        path = folder / FILE
        try:
            found = PilotPlan.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            wanted.write(folder)
            return wanted
        except (OSError, ValidationError):
            raise ConfigError(
                f"--out ({folder}) must hold a readable {FILE} of this version, and {path} is "
                "not; choose another folder"
            ) from None
        if found.sessions != wanted.sessions:
            raise ConfigError(
                f"--sessions ({wanted.sessions}) must be as at the beginning ({found.sessions}), "
                "because a decision depends on it; give the same, or choose another folder"
            )
        return found
