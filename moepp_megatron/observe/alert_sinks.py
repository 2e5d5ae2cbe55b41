"""The alert sinks of a training run: `RUN/alerts.jsonl`, the console, and a webhook."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from moepp_megatron.file_names import ALERTS_FILE
from moepp_megatron.observe.alerts import Alert
from moepp_megatron.observe.line_file import LineFile
from moepp_megatron.observe.webhook import Webhook, read_address

logger = logging.getLogger(__name__)


class _AlertSink(Protocol):
    """Receives alerts. One rank of a run owns the sinks."""

    def send(self, alert: Alert) -> None:
        """Receive one alert; returns at once."""

    def close(self) -> None:
        """End the sink; nothing is sent after it."""


class _AlertFile:
    """Appends each alert to `RUN/alerts.jsonl` as one line.

    The file is in the order of time: a resumed or rolled back run keeps the alerts of steps that
    are repeated.

    Args:
        start_over: Begin an empty file, for a run that begins at its first step.

    Raises:
        OSError: If the file cannot be opened.
    """

    def __init__(self, path: Path, start_over: bool = False) -> None:
        self._file = LineFile(path, start_over)
        # A killed run may have left an unfinished line.
        self._file.cut(self._file.read().rfind(b"\n") + 1)

    def send(self, alert: Alert) -> None:
        """Append the alert.

        Raises:
            OSError: If the disk is full or gone.
            ConfigError: If the folder has become another run's.
        """
        self._file.append(alert.to_json_line().encode())

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()


class _AlertLines:
    """Prints each alert as one line."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def send(self, alert: Alert) -> None:
        """Print the alert."""
        self._say(alert.text())

    def close(self) -> None:
        """Close nothing: there are no resources."""


class AlertSinks:
    """Passes each alert to every sink. A failure is printed; the sink is tried again next time."""

    def __init__(self, sinks: Sequence[_AlertSink]) -> None:
        self._sinks = list(sinks)

    def send(self, alert: Alert) -> None:
        """Pass the alert on; nothing is raised, since an alert must not end a training run."""
        for sink in self._sinks:
            try:
                sink.send(alert)
            except Exception as error:
                logger.error(
                    "step %d: %s could not take an alert: %s",
                    alert.step,
                    type(sink).__name__,
                    error,
                )

    def close(self) -> None:
        """Close every sink, whatever the others do."""
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:
                logger.warning("%s could not be closed: %s", type(sink).__name__, error)


def open_alert_sinks(
    run_dir: Path,
    run_name: str,
    say: Callable[[str], None],
    *,
    start_over: bool = False,
    webhook_url_env: str | None = None,
) -> AlertSinks:
    """`RUN/alerts.jsonl`, a line on the console, and the webhook if one is set.

    Args:
        start_over: Whether the run begins at its first step; else earlier alerts are kept.
    """
    wanted: dict[str, Callable[[], _AlertSink]] = {
        ALERTS_FILE: lambda: _AlertFile(run_dir / ALERTS_FILE, start_over)
    }
    if webhook_url_env is not None:
        wanted["webhook"] = lambda: Webhook(read_address(webhook_url_env), run_name)
    sinks: list[_AlertSink] = [_AlertLines(say)]
    for name, make in wanted.items():
        try:
            sinks.append(make())
        except (OSError, ValueError) as error:  # telling must not keep a run from starting
            logger.warning("no %s: %s", name, error)
    return AlertSinks(sinks)
