"""State of a run, judged from outside: it continues, has ended or is silent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from moepp_megatron.observe.status import RunStatus
from moepp_megatron.tools.report.live.history import History

State = Literal["waiting", "starting", "running", "silent", "finished", "stopped", "died"]
STATES: tuple[State, ...] = get_args(State)

# Evaluation and saving lie between records too, and a short step says little about them.
_SILENT_INTERVALS = 10
_SILENT_AT_LEAST_S = 60.0


@dataclass(frozen=True)
class RunHealth:
    """The state of a run.

    Attributes:
        state: ``waiting`` (nothing of it is there), ``starting`` (no record yet), ``running``,
            ``silent`` (no record for long), ``finished``, ``stopped`` (on request, or before its
            last step), ``died`` (its process is gone without a report).
        resume_command: The command that its folder names to resume a stopped run; None without one.
    """

    state: State
    text: str
    resume_command: str | None = None

    @property
    def is_over(self) -> bool:
        """True if the run will write no more records by itself."""
        return self.state in ("finished", "stopped", "died")


def judge(
    history: History,
    total_steps: int | None,
    record_age_s: float | None,
    status: RunStatus | None,
    now: float,
) -> RunHealth:
    """The state of a run.

    Args:
        total_steps: ``training.train_iters``; None without a configuration.
        status: Content of `status.json`; None if there is none.
        now: Seconds since 1970.
    """
    newest = history.newest
    step = newest.step if newest is not None else 0
    if newest is not None and total_steps is not None and step >= total_steps:
        return RunHealth("finished", f"finished {_ago(record_age_s)}")
    if status is not None and status.state == "ended":
        since = f"{_short_time(max(0.0, now - status.time))} ago"
        return RunHealth("stopped", f"stopped {since}", status.resume_command_here())
    gone = status is not None and status.is_gone()
    if newest is None or record_age_s is None:
        if gone:
            return RunHealth("died", "its process is gone; it had no record yet")
        if total_steps is None:
            return RunHealth("waiting", "not started: no config.yaml yet")
        return RunHealth("starting", "starting: no record yet")
    if gone:
        return RunHealth("died", f"its process is gone; last record {_ago(record_age_s)}")
    interval = history.record_interval_s
    if record_age_s > _silent_after_s(history):
        usual = f"; one came every {_short_time(interval)}" if math.isfinite(interval) else ""
        return RunHealth("silent", f"no record for {_short_time(record_age_s)}{usual}")
    return RunHealth("running", f"running, last record {_ago(record_age_s)}")


def _silent_after_s(history: History) -> float:
    """Seconds without a record after which a run counts as silent."""
    interval = history.record_interval_s
    if not math.isfinite(interval):
        return _SILENT_AT_LEAST_S
    return max(_SILENT_AT_LEAST_S, _SILENT_INTERVALS * interval)


def _short_time(seconds: float) -> str:
    """A time in its largest unit or two: 5 s, 3 min, 2 h 10 min, 3 days."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} days"


def _ago(seconds: float | None) -> str:
    return "at an unknown time" if seconds is None else f"{_short_time(seconds)} ago"
