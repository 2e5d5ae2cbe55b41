"""Alerts about what training already does by itself: refused batches, rollbacks, failed saves."""

from __future__ import annotations

import time
from pathlib import Path

from moepp_megatron.config import Config
from moepp_megatron.observe.alert_sinks import open_alert_sinks
from moepp_megatron.observe.alerts import Alert, AlertSinks
from moepp_megatron.observe.sinks import Sinks
from moepp_megatron.training.checkpoint.progress import Progress


def open_run_alerts(config: Config, sinks: Sinks, progress: Progress) -> AlertSinks:
    """The alert sinks of the run, on the rank that owns its sinks."""
    return open_alert_sinks(
        Path(config.run.dir),
        config.run.name,
        sinks.say,
        start_over=progress.step == 0,
        webhook_url_env=config.observe.webhook_url_env,
    )


def batch_skipped(progress: Progress, reason: str) -> Alert:
    """The numerical guard refused a batch."""
    return _guard(progress, reason, "skip_batch")


def rolled_back(progress: Progress, reason: str) -> Alert:
    """The numerical guard went back to a checkpoint; `progress` is from before."""
    return _guard(progress, reason, "rollback")


def save_failed(progress: Progress, failed_saves: int, reason: str) -> Alert:
    """A checkpoint could not be written."""
    return Alert(
        step=progress.step,
        time=time.time(),
        rule="failed_save",
        metric="failed_saves",
        value=failed_saves,
        condition=reason,
        severity="critical",
        action="warn",
    )


def _guard(progress: Progress, reason: str, action: str) -> Alert:
    return Alert(
        step=progress.step,
        time=time.time(),
        rule="numerical_guard",
        metric="skipped_steps",
        value=progress.skipped_steps,
        condition=reason,
        severity="critical" if action == "rollback" else "warning",
        action=action,
    )
