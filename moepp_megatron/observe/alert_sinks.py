"""The alert sinks of a training run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from moepp_megatron.file_names import ALERTS_FILE
from moepp_megatron.observe.alerts import AlertFile, AlertLines, AlertSink, AlertSinks
from moepp_megatron.observe.webhook import Webhook, read_address

logger = logging.getLogger(__name__)


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
    wanted: dict[str, Callable[[], AlertSink]] = {
        ALERTS_FILE: lambda: AlertFile(run_dir / ALERTS_FILE, start_over)
    }
    if webhook_url_env is not None:
        wanted["webhook"] = lambda: Webhook(read_address(webhook_url_env), run_name)
    sinks: list[AlertSink] = [AlertLines(say)]
    for name, make in wanted.items():
        try:
            sinks.append(make())
        except (OSError, ValueError) as error:  # telling must not keep a run from starting
            logger.warning("no %s: %s", name, error)
    return AlertSinks(sinks)
