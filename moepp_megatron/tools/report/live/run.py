"""Watches a run's folder: its configuration, records, alerts and whether it is alive."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import ValidationError

from moepp_megatron.config.paths import looked_at
from moepp_megatron.file_names import ALERTS_FILE, CONFIG_FILE, METRICS_FILE, RUN_FILES, is_of_run
from moepp_megatron.observe.alerts import Alert, parse_alert
from moepp_megatron.observe.metrics import StepMetrics
from moepp_megatron.observe.numbers import Labels, numbers
from moepp_megatron.observe.status import RunStatus, read_status
from moepp_megatron.observe.tail import Tail
from moepp_megatron.tools.report.live.history import History
from moepp_megatron.tools.report.live.liveness import RunHealth, judge
from moepp_megatron.tools.report.run_data import (
    ReportError,
    RunConfig,
    read_config,
    refuse_folder_of_runs,
)

# Alerts that are remembered; the file has all.
_KEPT_ALERTS = 200


class LiveRun:
    """The known state of a run; `poll` updates it.

    Attributes:
        damaged_lines: Number of invalid lines in the records' file.

    Raises:
        ReportError: If it is not a folder, or not a run's.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        check_folder(folder)
        self.folder = folder
        self.config: RunConfig | None = None
        self.history = History()
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
        """Read new records and alerts.

        Raises:
            ReportError: If a file exists that cannot be read, or is not a configuration.
        """
        try:
            self._read_config()
            self._read_records()
            self._read_alerts()
        except OSError as error:
            raise ReportError(f"{self.folder}: cannot be read ({error.strerror})") from error
        self._status = read_status(self.folder)

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
        experts = None if self.config is None else self.config.experts
        return numbers(self.history.latest.items(), experts, known)

    def health(self) -> RunHealth:
        """State of the run: continues, ended, or silent."""
        total = self.config.training.train_iters if self.config is not None else None
        return judge(self.history, total, self.record_age_s, self._status, self._clock())

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
        is_rewritten = False
        while any(news := self._metrics.poll()):
            if news.rewritten:
                self.history.start_over()
                self.damaged_lines, is_rewritten = 0, True
            for line in filter(bytes.strip, news.lines):
                try:
                    self.history.add(StepMetrics.model_validate_json(line))
                except ValidationError:
                    self.damaged_lines += 1
            self._record_time = self._metrics.mtime
        if is_rewritten:
            self.history.finish_rewrite()

    def _read_alerts(self) -> None:
        while any(news := self._alert_lines.poll()):
            if news.rewritten:
                self.alerts.clear()
                self.alert_counts.clear()
            for alert in filter(None, map(parse_alert, news.lines)):
                self.alerts.append(alert)
                self.alert_counts[alert.rule, alert.severity] += 1


def check_folder(folder: Path) -> None:
    """Refuse a path that cannot be a run's folder.

    An empty one may become a run's, and so may one that a waiting job writes its logs to.

    Raises:
        ReportError: If it cannot; names the path, the rule and a remedy.
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
