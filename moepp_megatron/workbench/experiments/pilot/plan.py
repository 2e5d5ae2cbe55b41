"""The plan that a pilot fixes before any decision: its looks, and the arms matched to MoE++.

DIR/plan.json  written by the first call, completed once the MoE++ arms were timed
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from moepp_megatron.config import ConfigError
from moepp_megatron.runtime.atomic import write_atomic
from moepp_megatron.workbench.experiments.pilot.statistics import Estimate

FILE = "plan.json"


class Match(BaseModel):
    """What was measured of a MoE++ arm, and the arms that follow from it.

    Attributes:
        ffn_share: FFN share of its selections, mean over the seeds of the first look.
        log_time_ratio: Logarithm of its step time over vanilla's, mean over sessions.
        error: Standard error of that; None with one session.
        sessions: Sessions.
        steps: Its steps in vanilla's time.
        width: Inner width of the experts of the vanilla model with its compute.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    ffn_share: float
    log_time_ratio: float
    error: float | None
    sessions: int
    steps: int
    width: int

    @property
    def speed(self) -> Estimate:
        """The logarithm of the time ratio with its uncertainty."""
        return Estimate(self.log_time_ratio, self.error, max(self.sessions - 1, 0))


class Plan(BaseModel):
    """What is fixed.

    Attributes:
        first: Seeds of the first look; the k-th look comes after k times as many.
        arms: Names of the MoE++ arms, which share the error that is allowed.
        sessions: Sessions that time each of them.
        matches: What was measured, keyed by MoE++ arm; empty before they were timed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    first: int
    arms: list[str]
    sessions: int
    matches: dict[str, Match] = {}

    def write(self, folder: Path) -> None:
        """Write the file.

        Raises:
            OSError: If it cannot be written.
        """
        write_atomic(folder / FILE, (self.model_dump_json(indent=1) + "\n").encode())

    @staticmethod
    def read(folder: Path) -> Plan | None:
        """The plan of a pilot that has begun; None for a new one.

        Raises:
            ConfigError: The file is damaged.
        """
        path = folder / FILE
        try:
            return Plan.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError):
            raise ConfigError(
                f"--out ({folder}) must hold a readable {FILE}, and {path} is not; choose another "
                "folder"
            ) from None

    @staticmethod
    def claim(folder: Path, wanted: Plan) -> Plan:
        """The plan in force: the folder's own, or else `wanted`, which is written.

        Raises:
            ConfigError: The folder has other MoE++ arms or sessions.
        """
        found = Plan.read(folder)
        if found is None:
            wanted.write(folder)
            return wanted
        for name, before, now in (
            ("--taus", ", ".join(found.arms), ", ".join(wanted.arms)),
            ("--sessions", found.sessions, wanted.sessions),
        ):
            if before != now:
                raise ConfigError(
                    f"{name} ({now}) must be as at the beginning ({before}), because the level of "
                    "a decision depends on it; give the same, or choose another folder"
                )
        return found
