"""Watches a run's folder: its configuration, records, alerts and whether it is alive."""

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

from pydantic import ValidationError

from moepp_megatron.config.paths import looked_at
from moepp_megatron.file_names import ALERTS_FILE, CONFIG_FILE, METRICS_FILE, RUN_FILES, is_of_run
from moepp_megatron.observe.alerts import Alert
from moepp_megatron.observe.metrics import StepMetrics
from moepp_megatron.observe.numbers import Labels, numbers
from moepp_megatron.observe.status import RunStatus
from moepp_megatron.observe.tail import Tail
from moepp_megatron.tools.report.formatting import duration
from moepp_megatron.tools.report.run_data import (
    ReportError,
    RunConfig,
    read_config,
    refuse_folder_of_runs,
)

# waiting: nothing of it is there; starting: no record yet; silent: no record for long; stopped: on
# request, or before its last step; died: its process is gone without a report.
State = Literal["waiting", "starting", "running", "silent", "finished", "stopped", "died"]
STATES: tuple[State, ...] = get_args(State)

# Evaluation and saving lie between records too, and a short step says little about them.
_SILENT_INTERVALS = 10
_SILENT_AT_LEAST_S = 60.0
# Enough steps that one slow one (a checkpoint, an evaluation) does not move the estimate.
_RECENT = 20
# Alerts that are remembered; the file has all.
_KEPT_ALERTS = 200


class _History:
    """The records so far; a record of an earlier step undoes those from that step on."""

    def __init__(self) -> None:
        # Steps strictly increasing.
        self.recent: deque[StepMetrics] = deque(maxlen=_RECENT)
        # The newest value under each key; not every record has every key.
        self.latest: dict[str, Any] = {}

    @property
    def newest(self) -> StepMetrics | None:
        """The last record; None before the first."""
        return self.recent[-1] if self.recent else None

    def add(self, record: StepMetrics) -> None:
        """Take the next record of the file."""
        while self.recent and self.recent[-1].step >= record.step:
            self.recent.pop()
        self.recent.append(record)
        self.latest.update((key, value) for key, value in record if value is not None)

    @property
    def step_time_s(self) -> float:
        """Median time of a step over the last records; NaN before the first."""
        return median(r.step_time_s for r in self.recent) if self.recent else math.nan

    @property
    def record_interval_s(self) -> float:
        """Training time between two of the last records; NaN before the first."""
        if not self.recent:
            return math.nan
        gaps = max(1, len(self.recent) - 1)
        return self.step_time_s * max(1.0, (self.recent[-1].step - self.recent[0].step) / gaps)


@dataclass(frozen=True)
class _RunHealth:
    """The state of a run."""

    state: State
    text: str
    resume_command: str | None = None  # that its folder names to resume a stopped run

    @property
    def is_over(self) -> bool:
        """True if the run will write no more records by itself."""
        return self.state in ("finished", "stopped", "died")


def _judge(
    history: _History,
    total_steps: int | None,
    record_age_s: float | None,
    status: RunStatus | None,
    now: float,
) -> _RunHealth:
    """The state of a run at `now`, seconds since 1970; no `total_steps` without a configuration."""
    newest = history.newest
    step = newest.step if newest is not None else 0
    if newest is not None and total_steps is not None and step >= total_steps:
        return _RunHealth("finished", f"finished {_ago(record_age_s)}")
    if status is not None and status.state == "ended":
        since = f"{duration(max(0.0, now - status.time))} ago"
        return _RunHealth("stopped", f"stopped {since}", status.resume_command_here())
    gone = status is not None and status.is_gone()
    if newest is None or record_age_s is None:
        if gone:
            return _RunHealth("died", "its process is gone; it had no record yet")
        if total_steps is None:
            return _RunHealth("waiting", "not started: no config.yaml yet")
        return _RunHealth("starting", "starting: no record yet")
    if gone:
        return _RunHealth("died", f"its process is gone; last record {_ago(record_age_s)}")
    interval = history.record_interval_s
    if record_age_s > _silent_after_s(history):
        usual = f"; one came every {duration(interval)}" if math.isfinite(interval) else ""
        return _RunHealth("silent", f"no record for {duration(record_age_s)}{usual}")
    return _RunHealth("running", f"running, last record {_ago(record_age_s)}")


def _silent_after_s(history: _History) -> float:
    """Seconds without a record after which a run counts as silent."""
    interval = history.record_interval_s
    if not math.isfinite(interval):
        return _SILENT_AT_LEAST_S
    return max(_SILENT_AT_LEAST_S, _SILENT_INTERVALS * interval)


def _ago(seconds: float | None) -> str:
    return "at an unknown time" if seconds is None else f"{duration(seconds)} ago"


class LiveRun:
    """The known state of a run; `poll` updates it. ReportError if it is not a run's folder."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        check_folder(folder)
        self.folder = folder
        self.config: RunConfig | None = None
        self.history = _History()
        self.alerts: deque[Alert] = deque(maxlen=_KEPT_ALERTS)
        self.alert_counts: Counter[tuple[str, str]] = Counter()
        self.damaged_lines = 0
        self._clock = clock
        self._config_mtime_ns = -1
        self._metrics = Tail(folder / METRICS_FILE)
        self._alert_lines = Tail(folder / ALERTS_FILE)
        self._status: RunStatus | None = None
        self._record_time: float | None = None

    def poll(self) -> None:
        """Read new records and alerts; ReportError for an unreadable file or no configuration."""
        try:
            self._read_config()
            self._read_records()
            self._read_alerts()
        except OSError as error:
            raise ReportError(f"{self.folder}: cannot be read ({error.strerror})") from error
        self._status = RunStatus.read(self.folder)

    @property
    def record_age_s(self) -> float | None:
        """Seconds since the last record was written; None before the first."""
        if self._record_time is None or self.history.newest is None:
            return None
        # The clocks of two machines that share a disk may differ.
        return max(0.0, self._clock() - self._record_time)

    @property
    def target_ffn_share(self) -> float | None:
        """Present target of the FFN share of all selections: the budget's, or phi."""
        newest = self.history.newest
        if newest is not None and newest.ffn_target is not None:
            return newest.ffn_target
        return self.config.phi if self.config is not None else None

    def numbers(self) -> Iterator[tuple[str, Labels, float]]:
        """The newest of every number; without a configuration none of single experts."""
        known = () if self.config is None else self.config.moe_layers
        experts = None if self.config is None else self.config.moe
        return numbers(self.history.latest.items(), experts, known)

    def health(self) -> _RunHealth:
        """State of the run: continues, ended, or silent."""
        total = self.config.training.train_iters if self.config is not None else None
        return _judge(self.history, total, self.record_age_s, self._status, self._clock())

    def _read_config(self) -> None:
        path = self.folder / CONFIG_FILE
        try:
            mtime = path.stat().st_mtime_ns
        except FileNotFoundError:
            return
        if mtime != self._config_mtime_ns:
            self.config, _ = read_config(path)
            self._config_mtime_ns = mtime

    def _read_records(self) -> None:
        while any(news := self._metrics.poll()):
            if news.rewritten:
                self.history, self.damaged_lines = _History(), 0
            for line in filter(bytes.strip, news.lines):
                try:
                    self.history.add(StepMetrics.model_validate_json(line))
                except ValidationError:
                    self.damaged_lines += 1
            self._record_time = self._metrics.mtime

    def _read_alerts(self) -> None:
        while any(news := self._alert_lines.poll()):
            if news.rewritten:
                self.alerts.clear()
                self.alert_counts.clear()
            for alert in filter(None, map(Alert.parse, news.lines)):
                self.alerts.append(alert)
                self.alert_counts[alert.rule, alert.severity] += 1


def check_folder(folder: Path) -> None:
    """Refuse a path that cannot be a run's folder; a ReportError names it, the rule and a remedy.

    An empty one may become a run's, and so may one that a waiting job writes its logs to.
    """
    if not folder.is_dir():
        raise ReportError(
            f"{folder}: is not a folder{looked_at(folder)}; name the folder of a run that "
            "`moepp train` has started, or make it to wait for one"
        )
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise ReportError(f"{folder}: cannot be read ({error.strerror})") from error
    if names.isdisjoint(RUN_FILES) and not all(map(is_of_run, names - {"slurm"})):
        refuse_folder_of_runs(folder)
        raise ReportError(
            f"{folder}: holds other files but no {CONFIG_FILE} or {METRICS_FILE}; name the folder "
            "of a run (run.dir)"
        )
