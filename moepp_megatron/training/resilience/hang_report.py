"""Finds the rank that blocks the others, from the heartbeats of all ranks in RUN/heartbeats.

One small file per rank, not a store: files need no connection that a stuck rank could hold up, and
stay readable after a rank is gone. Ranks never compare clocks, only whether a peer's counter moves.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
from collections import Counter
from collections.abc import Collection, Mapping
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


_MOST_LINES = 64


def hang_report(
    beats: Mapping[int, Heartbeat],
    silent: Collection[int],
    world_size: int,
    pending: Mapping[int, str],
) -> str:
    """Name the rank that is behind, and what the others wait in.

    Args:
        beats: Last heartbeat of each rank, including the place of its stacks.
        silent: Ranks whose heartbeat has stopped or is missing.
        world_size: Ranks of the run.
        pending: Collective that a rank has not completed, from its flight recorder.
    """
    held_up = [rank for rank in range(world_size) if rank not in silent and rank in beats]
    lines = []
    culprits, why = _culprits({rank: beats[rank] for rank in held_up}, silent)
    for rank in culprits:
        lines.append(f"hang: rank {rank} {why}{_last_seen(beats.get(rank))}")
    if not culprits:
        lines.append(f"hang: {why}")
    waits = Counter(
        pending.get(rank) or beats[rank].collective or beats[rank].place or "an unknown place"
        for rank in held_up
        if rank not in culprits
    )
    for place, count in waits.most_common(5):
        lines.append(f"  {count} other rank{'s' * (count > 1)} wait{'s' * (count == 1)} in {place}")
    for rank in held_up[:_MOST_LINES]:
        beat = beats[rank]
        lines.append(
            f"  rank {rank}: step {beat.step}, {beat.phase}, no progress for {beat.stalled_s:.1f} s"
            f", in {beat.collective or 'no collective'} ({beat.place})"
        )
    return "\n".join(lines)


def _culprits(awake: Mapping[int, Heartbeat], silent: Collection[int]) -> tuple[list[int], str]:
    """The suspected ranks and why; the strongest sign first."""
    if silent:
        return sorted(silent), "does not answer"
    latest = max(beat.count for beat in awake.values())
    behind = [rank for rank, beat in awake.items() if beat.count < latest]
    if behind:
        least = min(awake[rank].count for rank in behind)
        return [rank for rank in behind if awake[rank].count == least], "is behind"
    outside = [rank for rank, beat in awake.items() if beat.collective is None]
    if outside and len(outside) < len(awake):
        return outside, "is in no collective"
    if len(awake) == 1:
        return list(awake), "makes no progress"
    return [], "all ranks answer and wait for each other: collectives do not match, or the network"


def _last_seen(beat: Heartbeat | None) -> str:
    if beat is None:
        return " and has never written a heartbeat"
    where = f"; last seen in step {beat.step} ({beat.phase}), process {beat.pid} on {beat.host}"
    if beat.collective is None and beat.place is not None:
        where += f", in {beat.place}"
    state = _process_state(beat)
    return where + (f", which is {state}" if state else "")


def _process_state(beat: Heartbeat) -> str | None:
    """The kernel's state of a process of this host, such as `T (stopped)`; None elsewhere."""
    if beat.host != socket.gethostname():
        return None
    try:
        status = Path(f"/proc/{beat.pid}/status").read_text(encoding="utf-8")
    except OSError:
        return "gone"
    for line in status.splitlines():
        if line.startswith("State:"):
            return line.removeprefix("State:").strip()
    return None
