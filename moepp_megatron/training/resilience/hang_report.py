"""Finds the rank that blocks the others, from the heartbeats of all ranks in RUN/heartbeats.

One small file per rank, not a store: files need no connection that a stuck rank could hold up, and
stay readable after a rank is gone. Ranks never compare clocks, only whether a peer's counter moves.
"""

import contextlib
import json
import logging
import os
import shutil
import socket
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moepp_megatron.runtime.atomic import write_atomic

_ALARM = "alarm"


@dataclass(frozen=True)
class Heartbeat:
    """Last status report of a rank, from process `pid` on machine `host`.

    Attributes:
        beat: Counts up as long as the process runs at all.
        step, phase: Optimizer step and phase in work.
        count: Phases entered so far.
        collective: The collective that its main thread is in, or None.
        place: Where its main thread is, or None if it has not been looked at.
        has_dumped: True if its stacks are written.
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
    """The folder RUN/heartbeats, shared by all ranks."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def clear(self) -> None:
        """Delete files of earlier attempts; one rank calls it before any rank beats.

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
        """Tell all ranks to write their stacks into folder `name`, or the one named before."""
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
    """Name the rank that is behind, and the collectives that the others wait in.

    The heartbeat of `silent` ranks has stopped or is missing; `pending` has, by rank, a collective
    that it has not completed, from its flight recorder.
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


logger = logging.getLogger(__name__)

# A few steps of a large model; about half a kilobyte each.
_ENTRIES = "2000"
_PREFIX = "trace_rank_"


def enable_flight_recorder(dump_folder: Path) -> None:
    """Switch torch's flight recorder on, before the process group exists; the user's settings win.

    NCCL's own watchdog writes into `dump_folder` when a collective times out.
    """
    defaults = {
        "TORCH_FR_BUFFER_SIZE": ("TORCH_NCCL_TRACE_BUFFER_SIZE", _ENTRIES),
        "TORCH_FR_DUMP_ON_TIMEOUT": ("TORCH_NCCL_DUMP_ON_TIMEOUT", "1"),
        "TORCH_FR_DUMP_TEMP_FILE": ("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(dump_folder / _PREFIX)),
    }
    for name, (older_name, value) in defaults.items():
        if older_name not in os.environ:
            os.environ.setdefault(name, value)


def dump_flight_record(folder: Path, rank: int) -> None:
    """Write this rank's records: JSON for `pending_collectives`, a pickle for torch's own tool.

    That is `python -m torch.distributed.flight_recorder.fr_trace FOLDER -p trace_rank_`.
    """
    import torch.distributed as dist
    from torch._C import _distributed_c10d

    # Typed as far as this build goes: one without NCCL lacks its functions, an older torch gloo's.
    c10d: Any = _distributed_c10d
    try:
        if dist.get_backend() == "nccl":
            as_json, as_pickle = c10d._dump_nccl_trace_json(), c10d._dump_nccl_trace()
        else:
            as_json, as_pickle = c10d._dump_fr_trace_json(), c10d._dump_fr_trace()
        (folder / f"{_PREFIX}{rank}").write_bytes(as_pickle)
        _json_file(folder, rank).write_bytes(
            as_json if isinstance(as_json, bytes) else as_json.encode()
        )
    except (AttributeError, OSError, RuntimeError) as error:
        logger.warning("no flight record of rank %d: %s", rank, error)


def pending_collectives(folder: Path, world_size: int) -> dict[int, str]:
    """For each rank with a dump that shows one: its oldest collective without an end."""
    pending = {}
    for rank in range(world_size):
        try:
            record = json.loads(_json_file(folder, rank).read_bytes())
        except (OSError, ValueError):
            continue
        described = _pending(record)
        if described is not None:
            pending[rank] = described
    return pending


def _pending(record: dict[str, Any]) -> str | None:
    """Describe the oldest entry that its group has enqueued and not completed."""
    status = record.get("pg_status", {})
    for entry in sorted(record.get("entries", []), key=lambda entry: entry["record_id"]):
        if entry.get("is_p2p") or entry.get("state") == "completed":
            continue
        group = status.get(str(entry["pg_id"]), {})
        if entry["collective_seq_id"] > int(group.get("last_completed_collective", 1 << 62)):
            name, description = entry["process_group"][:2]
            return (
                f"{entry['profiling_name']} number {entry['collective_seq_id']} "
                f"of group {description or name}, sizes {entry['input_sizes']}"
            )
    return None


def _json_file(folder: Path, rank: int) -> Path:
    return folder / f"collectives_rank_{rank}.json"
