"""Heartbeats: one small file per rank in RUN/heartbeats, which others read when a run hangs.

Files, not a store: they need no connection that a stuck rank could hold up, and stay readable
after a rank is gone. Ranks never compare clocks, only whether a peer's counter moves.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from moepp_megatron.runtime.atomic import write_atomic

_ALARM = "alarm"


@dataclass(frozen=True)
class Heartbeat:
    """Last status report of a rank.

    Attributes:
        rank: The rank.
        host: Its machine.
        pid: Its process there.
        beat: Counts up as long as the process runs at all.
        step: Optimizer step in work.
        phase: Its current phase.
        count: Phases entered so far.
        stalled_s: Seconds without progress.
        collective: The collective its main thread is in, or None.
        place: Where its main thread is, or None if it has not been looked at.
        has_dumped: Whether its stacks are written.
    """

    rank: int
    host: str
    pid: int
    beat: int
    step: int
    phase: str
    count: int
    stalled_s: float
    collective: str | None = None
    place: str | None = None
    has_dumped: bool = False


class HeartbeatFolder:
    """The folder RUN/heartbeats.

    Args:
        path: The folder, shared by all ranks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def clear(self) -> None:
        """Delete files of earlier attempts; called by one rank before any rank beats.

        Where the disk refuses there are no heartbeats, as in `write`.
        """
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.path.mkdir(parents=True, exist_ok=True)

    def write(self, heartbeat: Heartbeat) -> None:
        """Replace this rank's file; quietly does nothing where the disk refuses."""
        content = json.dumps(asdict(heartbeat)).encode()
        with contextlib.suppress(OSError):
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomic(self._file(heartbeat.rank), content, is_synced=False)

    def read(self, world_size: int) -> dict[int, Heartbeat]:
        """The newest heartbeat of every rank that has a readable one."""
        heartbeats = {}
        for rank in range(world_size):
            with contextlib.suppress(OSError, ValueError, TypeError):
                content = json.loads(self._file(rank).read_text(encoding="utf-8"))
                heartbeats[rank] = Heartbeat(**content)
        return heartbeats

    def raise_alarm(self, name: str) -> str:
        """Tell all ranks to write their stacks.

        Args:
            name: Name of the folder for the stacks.

        Returns:
            The name that is used: that of the first rank to raise the alarm.
        """
        with contextlib.suppress(OSError), open(self.path / _ALARM, "x", encoding="utf-8") as file:
            file.write(name)
        return self.alarm() or name

    def alarm(self) -> str | None:
        """The name given with the alarm, or None if there is no alarm."""
        try:
            return (self.path / _ALARM).read_text(encoding="utf-8") or None
        except OSError:
            return None

    def _file(self, rank: int) -> Path:
        return self.path / f"rank_{rank:05d}.json"
