"""Sessions that time MoE++ against vanilla: both models in one process, step by step in turn.

A machine is faster or slower from one process to the next, by a few per cent. Arms that run one
after the other take that for a difference between them. Here both arms of a session see the same
machine, and the interval is over sessions.

DIR/speed/NAME.json  what `moepp bench step` has measured in one session
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moepp_megatron.config import Config
from moepp_megatron.runtime.launch import LaunchOptions
from moepp_megatron.workbench.experiments.pilot.arms import PilotArm
from moepp_megatron.workbench.experiments.pilot.runs import run_name
from moepp_megatron.workbench.experiments.pilot.statistics import Estimate
from moepp_megatron.workbench.experiments.runs import RunFailed, RunSet

# Steps of each model in a session; each round begins with the other one.
_ROUNDS = 20
# A share of exactly 1 has no tau.
_LARGEST_TAU = 10.0


@dataclass(frozen=True)
class Session:
    """One session.

    Attributes:
        arm: MoE++.
        share: Share of its selections that goes to FFN experts, at which its routing is held.
        number: Which session, from 1.
    """

    arm: PilotArm
    share: float
    number: int

    @property
    def name(self) -> str:
        """The name of its files."""
        return run_name(self.arm.arm, self.number).replace("-seed-", "-session-")


class SpeedSessions(RunSet[Session]):
    """The sessions on disk.

    Args:
        path: DIR, absolute.
        nproc: Ranks of each session.
    """

    noun = "sessions"
    parts = ("speed", "logs")

    def __init__(self, path: Path, nproc: int) -> None:
        super().__init__(path)
        self.nproc = nproc

    def file(self, session: Session) -> Path:
        """The file of its result."""
        return self.path / "speed" / f"{session.name}.json"

    def is_done(self, session: Session) -> bool:
        """Whether it has a result."""
        return self._log_ratio(session) is not None

    def title(self, session: Session) -> str:
        """What people read while it runs."""
        return f"speed, session {session.number}"

    def command(self, session: Session) -> list[str]:
        """What follows `moepp`."""
        arm, config = session.arm.arm, session.arm.config
        # The command starts the ranks itself only where it is typed by hand.
        file = self.path / "configs" / f"{run_name(arm, config.training.seed)}.yaml"
        options = ["--rounds", str(_ROUNDS), "--json", str(self.file(session))]
        return ["bench", "step", str(file), *_held_at(config, session.share), *options]

    def do(self, session: Session) -> None:
        """Time it.

        Raises:
            Interrupted: Stopped from outside.
            RunFailed: It failed.
        """
        log = self.log(session)
        options = LaunchOptions(self.nproc, output=log)
        reason = self.launch(session, options, self.command(session))
        if reason is None and not self.is_done(session):
            reason = "it has left no result"
        if reason is not None:
            raise RunFailed(f"session {session.name} failed: {reason}; see {log}")

    def log_time_ratio(self, sessions: Sequence[Session]) -> Estimate:
        """Logarithm of MoE++'s step time over vanilla's, over finished sessions."""
        found = [self._log_ratio(session) for session in sessions]
        return Estimate.of([value for value in found if value is not None])

    def _log_ratio(self, session: Session) -> float | None:
        try:
            speedup = json.loads(self.file(session).read_bytes())["speedup"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        is_number = isinstance(speedup, float) and 0 < speedup < math.inf
        return -math.log(speedup) if is_number else None


def _held_at(config: Config, share: float) -> list[str]:
    """Settings under which a perfect balance has this FFN share; a budget has its own and goes."""
    moe = config.moe
    settings = [f"moe.tau={moe.tau_for(min(share, moe.phi(_LARGEST_TAU))):.6g}"]
    if moe.budget.target_ffn_per_token is not None or moe.budget.start_ffn_per_token is not None:
        settings += [
            "moe.budget.target_ffn_per_token=null",
            "moe.budget.start_ffn_per_token=null",
            "moe.budget.controller=none",
        ]
    return settings
