"""A thread that ends a run which no longer makes progress."""

import contextlib
import faulthandler
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from moepp_megatron.config.exit_codes import HUNG
from moepp_megatron.config.schema import ResilienceSection
from moepp_megatron.runtime.atomic import write_atomic
from moepp_megatron.runtime.launch import write_status
from moepp_megatron.training.resilience.hang_report import (
    Heartbeat,
    HeartbeatFolder,
    dump_flight_record,
    hang_report,
    pending_collectives,
)

# Of these ordinary time limits hold; whatever has another name may take long.
STEP = "step"
FIRST_STEP = "first step"


@dataclass(frozen=True)
class _Moment:
    """One entry into a phase. Replaced as a whole, so that readers need no lock."""

    step: int  # the optimizer step in work
    phase: str  # `STEP`, `FIRST_STEP` or the name of something slow ("save")
    count: int  # phases entered so far, in the same order on every rank: one with less is behind
    since: float  # `time.monotonic()` of the entry


class Activity:
    """The present phase of the training thread."""

    def __init__(self) -> None:
        self.now = _Moment(0, "start", 0, time.monotonic())

    def enter(self, phase: str, step: int | None = None) -> None:
        """Begin a phase; counts as progress."""
        before = self.now
        number = before.step if step is None else step
        self.now = _Moment(number, phase, before.count + 1, time.monotonic())

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Enter a phase in the block, then return to the one before."""
        outer = self.now.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(outer)


logger = logging.getLogger(__name__)

_C10D, _CLOCK = "distributed_c10d.py", "/stragglers.py"
# Frames of the machinery around a wait, which are not about the program.
_UNINTERESTING = ("/torch/", "/threading.py", "/contextlib.py", _CLOCK)

# Looks this often within a timeout, but neither burdens the file system nor sleeps for minutes.
_LOOKS = 20
_SHORTEST_TICK_S, _LONGEST_TICK_S = 0.1, 10.0
# How many looks a rank waits for the others' stacks before it ends.
_GRACE_TICKS = 10


class Watchdog:
    """Ends a process that makes no progress, and names the rank that blocks it.

    Every rank has one. A rank in a collective may be stopped by another, so all notice at about the
    same time: the first one raises an alarm, all write their stacks into `RUN/hangs`, and the
    lowest rank that still runs writes the report there. `settings.hang_timeout_s` is above 0.
    """

    def __init__(self, run_dir: Path, activity: Activity, settings: ResilienceSection) -> None:
        self._folder = HeartbeatFolder(run_dir / "heartbeats")
        self._hangs = run_dir / "hangs"
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._activity, self._settings = activity, settings
        tick = settings.hang_timeout_s / _LOOKS
        self._tick_s = min(max(tick, _SHORTEST_TICK_S), _LONGEST_TICK_S)
        self._host, self._pid, self._beats = socket.gethostname(), os.getpid(), 0
        self._resumed_at = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Start watching; every rank must call."""
        if self._rank == 0:
            self._folder.clear()
        # A rank that saw an earlier attempt's alarm would end at once.
        dist.barrier()
        self._thread.start()

    def stop(self) -> None:
        """End the thread; training is over or has failed by itself."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        looked_at = time.monotonic()
        while not self._stop.wait(self._tick_s):
            if time.monotonic() - looked_at > self._settings.hang_timeout_s / 2:
                # This whole process was suspended (SIGSTOP, `scontrol suspend`) and continues now.
                self._resumed_at = time.monotonic()
            looked_at = time.monotonic()
            self._beat()
            if self._folder.alarm() is not None or self._stalled_s() > self._limit_s():
                # Training may have ended just now, or moved on while the disk was slow.
                if self._stop.is_set():
                    return
                self._end()

    def _stalled_s(self) -> float:
        return time.monotonic() - max(self._activity.now.since, self._resumed_at)

    def _limit_s(self) -> float:
        settings = self._settings
        is_step = self._activity.now.phase == STEP
        return settings.hang_timeout_s if is_step else settings.hang_slow_phase_timeout_s

    def _beat(self, has_dumped: bool = False) -> None:
        self._beats += 1
        now, stalled = self._activity.now, self._stalled_s()
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        self._folder.write(
            Heartbeat(
                rank=self._rank,
                host=self._host,
                pid=self._pid,
                beat=self._beats,
                step=now.step,
                phase=now.phase,
                count=now.count,
                stalled_s=round(stalled, 1),
                collective=_collective_of(frame),
                place=_place_of(frame),
                has_dumped=has_dumped,
            )
        )

    def _end(self) -> None:
        """Write what is known and end the process, so that the launcher starts it again."""
        try:
            name = self._folder.raise_alarm(
                f"{time.strftime('%Y%m%dT%H%M%S')}_step_{self._activity.now.step}"
            )
            folder = self._hangs / name
            self._dump(folder)
            silent = self._wait_for_others()
            self._report(folder, silent)
        except Exception:
            # Nothing must keep a hung rank alive, least of all a full disk.
            logger.exception("rank %d hangs and could not report it in full", self._rank)
        finally:
            sys.stderr.flush()
            with contextlib.suppress(OSError):
                write_status(HUNG)
            # Not sys.exit: the main thread is stuck, and leaving groups in order waits for peers.
            os._exit(HUNG)

    def _dump(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"stacks_rank_{self._rank}.txt").open("w", encoding="utf-8") as file:
            file.write(f"rank {self._rank}, {self._activity.now}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        dump_flight_record(folder, self._rank)
        self._beat(has_dumped=True)

    def _wait_for_others(self) -> list[int]:
        """Keep beating until all have written their stacks; the ranks that do not answer."""
        # Even if this rank is the slow one: its end would end the others before their reports.
        first = self._folder.read(self._world_size)
        latest = first
        for _ in range(_GRACE_TICKS):
            time.sleep(self._tick_s)
            self._beat(has_dumped=True)
            latest = self._folder.read(self._world_size)
            if len(latest) == self._world_size and all(b.has_dumped for b in latest.values()):
                break
        return [
            rank
            for rank in range(self._world_size)
            if rank not in latest or (rank in first and not _moved(first[rank], latest[rank]))
        ]

    def _report(self, folder: Path, silent: list[int]) -> None:
        report_file = folder / "report.txt"
        if self._rank != min(set(range(self._world_size)) - set(silent)):
            # The launcher ends all ranks when the first one ends: let the reporting one finish.
            for _ in range(_GRACE_TICKS):
                if report_file.exists():
                    return
                time.sleep(self._tick_s)
            return
        beats = self._folder.read(self._world_size)
        pending = pending_collectives(folder, self._world_size)
        report = hang_report(beats, silent, self._world_size, pending)
        print(f"{report}\n  stacks: {folder}", file=sys.stderr, flush=True)
        write_atomic(report_file, f"{report}\n".encode(), is_synced=False)


def _moved(before: Heartbeat, after: Heartbeat) -> bool:
    """True if the process made progress in between."""
    return after.has_dumped or after.beat != before.beat


def _collective_of(frame: FrameType | None) -> str | None:
    """The outermost `torch.distributed` call in a stack and its group; None if there is none."""
    collective = None
    while frame is not None:
        code = frame.f_code
        if code.co_filename.endswith(_C10D) and not code.co_name.startswith(("_", "wrapper")):
            collective = f"{code.co_name}{_group_of(frame)}"
        elif collective is None and code.co_name == "timed" and code.co_filename.endswith(_CLOCK):
            # The wait for an asynchronous one is C++ and has no frame of its own.
            collective = "Work.wait"
        frame = frame.f_back
    return collective


def _place_of(frame: FrameType | None) -> str:
    """The innermost frame of this project, megatron or a user, as `file:line in function`."""
    innermost = frame
    while frame is not None:
        if not any(part in frame.f_code.co_filename for part in _UNINTERESTING):
            return _show(frame)
        frame = frame.f_back
    return _show(innermost) if innermost is not None else "an unknown place"


def _group_of(frame: FrameType) -> str:
    """` over the N ranks of GROUP`, from the call's arguments."""
    group = frame.f_locals.get("group") or dist.group.WORLD
    if group is None:
        return ""
    try:
        return f" over the {group.size()} ranks of group {group.group_desc or group.group_name}"
    except (AttributeError, RuntimeError):
        return ""


def _show(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    return f"{'/'.join(path.parts[-3:])}:{frame.f_lineno} in {frame.f_code.co_name}"
