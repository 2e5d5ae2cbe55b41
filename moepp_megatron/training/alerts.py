"""A run's sinks, and alerts about what training does by itself: refused batches, failed saves."""

import contextlib
import logging
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moepp_megatron.config import Config
from moepp_megatron.file_names import CONFIG_FILE
from moepp_megatron.observe.alert_sinks import AlertSinks, open_alert_sinks
from moepp_megatron.observe.alerts import Alert
from moepp_megatron.observe.sinks import Sinks, SinkSettings, open_sinks
from moepp_megatron.training.checkpoint.files import Progress
from moepp_megatron.training.checkpoint.write import CheckpointWriter
from moepp_megatron.training.run_folder import RunFolder

logger = logging.getLogger(__name__)


class RunAlerts:
    """The alerts of a run; only the rank that opens it passes any on."""

    def __init__(self) -> None:
        self._sinks: AlertSinks | None = None
        self._config: Config | None = None
        self._reported_failed_saves = 0

    def open(self, config: Config, sinks: Sinks, progress: Progress) -> None:
        """Open the alert sinks, on the rank that owns the run's sinks."""
        self._config = config
        self._sinks = open_alert_sinks(
            Path(config.run.dir),
            config.run.name,
            sinks.say,
            start_over=progress.step == 0,
            webhook_url_env=config.observe.webhook_url_env,
        )

    def send(self, *alerts: Alert) -> None:
        """Raise alerts."""
        if self._sinks is not None:
            for alert in alerts:
                self._sinks.send(alert)

    def complain(self, progress: Progress, checkpoints: CheckpointWriter) -> None:
        """Repeat that saves fail, until one succeeds; report each loss of files once."""
        failed = checkpoints.failed_saves
        if self._sinks is None or self._config is None:
            return
        folder = Path(self._config.run.dir)
        if not (folder / CONFIG_FILE).exists():
            self.send(_lost_files(progress, folder))
            with contextlib.suppress(OSError):
                RunFolder(self._config).write_config()
        if checkpoints.error is not None:
            logger.error("step %d: %s (%d failed saves)", progress.step, checkpoints.error, failed)
        if failed > self._reported_failed_saves:
            self._reported_failed_saves = failed
            fields = {"value": failed, "condition": str(checkpoints.last_failure), "action": "warn"}
            self.send(_alert(progress, "failed_save", "failed_saves", **fields))

    def close(self) -> None:
        """Close the sinks; nothing is sent after it."""
        if self._sinks is not None:
            self._sinks.close()


def _alert(progress: Progress, rule: str, metric: str, **fields: Any) -> Alert:
    """Make an alert, timed now; `value` is by default that field of `progress`."""
    fields = {"value": getattr(progress, metric, None), "severity": "critical"} | fields
    return Alert(step=progress.step, time=time.time(), rule=rule, metric=metric, **fields)


def _lost_files(progress: Progress, folder: Path) -> Alert:
    """Report that the run's folder, or files in it, were removed or renamed."""
    reason = (
        f"{folder} has lost its {CONFIG_FILE}, and maybe all else: it was removed or renamed "
        "while the run trains in it"
    )
    action = "write what follows there again"
    return _alert(progress, "lost_files", "tokens", condition=reason, action=action)


# What to do about refused batches, by action.
_REMEDIES = {
    "skip_batch": "look at the texts of the batch if others follow",
    "warn": "see what the texts of these batches have in common",
    "rollback": "lower optimizer.lr if it happens again",
    "accept": "if the data were not meant to change, stop and mend their source",
    "pause": "resume the run if these data are meant; else mend their source",
    "stop": "look at the texts of these batches and at how they were prepared",
}


def guard_alert(progress: Progress, reason: str, action: str) -> Alert:
    """Report that the guard refused a batch, or acts on many; `progress` is from before."""
    fields = {"condition": reason, "action": action}
    fields["severity"] = "critical" if action in ("rollback", "stop", "warn") else "warning"
    fields["remedy"] = f"{_REMEDIES[action]} (docs/guard.md#batches-that-are-refused)"
    return _alert(progress, "numerical_guard", "skipped_steps", **fields)


def new_stage(progress: Progress, reason: str) -> Alert:
    """Report that a new stage of the data begins."""
    fields = {"condition": reason, "severity": "info", "action": "both guards start again"}
    return _alert(progress, "new_stage", "tokens", **fields)


def open_run_sinks(config: Config, progress: Progress) -> Sinks | None:
    """The run's sinks; on one rank, since records are global, and None on the others."""
    if dist.get_rank() != 0:
        return None
    moe = config.moe
    return open_sinks(
        SinkSettings(
            Path(config.run.dir),
            moe,
            phi=moe.ffn_share,
            total_steps=config.training.train_iters,
            resume_step=progress.step + 1,
            wandb=config.observe.wandb,
            name=config.run.name,
            config=config.model_dump(mode="json"),
            moe_layers=[
                number for number, is_moe in enumerate(config.router_pattern, start=1) if is_moe
            ],
            plugins=config.observe.sinks,
        )
    )
