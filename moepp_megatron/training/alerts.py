"""A run's records and alerts, and alerts about refused batches, failed saves, lost files."""

import contextlib
import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moepp_megatron.config import Config
from moepp_megatron.file_names import CONFIG_FILE
from moepp_megatron.observe.alert_sinks import AlertSinks, open_alert_sinks
from moepp_megatron.observe.alerts import Alert
from moepp_megatron.observe.metrics import StepMetrics
from moepp_megatron.observe.sinks import Sinks, SinkSettings, open_sinks
from moepp_megatron.training.checkpoint.files import Progress
from moepp_megatron.training.checkpoint.write import CheckpointWriter
from moepp_megatron.training.run_folder import RunFolder

logger = logging.getLogger(__name__)


class RunOutput:
    """Records and alerts of a run; only rank 0 writes any, since they are global."""

    def __init__(self, config: Config, progress: Progress) -> None:
        self._config, self._reported_failed_saves = config, 0
        self._sinks, self._alerts = Sinks(()), AlertSinks(())
        if dist.get_rank() == 0:
            RunFolder(config).write_config()
            self._sinks = open_sinks(_settings(config, progress))
            self._alerts = open_alert_sinks(
                Path(config.run.dir),
                config.run.name,
                self._sinks.say,
                start_over=progress.step == 0,
                webhook_url_env=config.observe.webhook_url_env,
            )

    def write(self, record: StepMetrics) -> None:
        """Write a record."""
        self._sinks.write(record)

    def go_back(self, step: int) -> None:
        """Note that the run went back to the state after `step`."""
        self._sinks.go_back(step)

    def send(self, *alerts: Alert) -> None:
        """Raise alerts."""
        for alert in alerts:
            self._alerts.send(alert)

    def complain(self, progress: Progress, checkpoints: CheckpointWriter) -> None:
        """Repeat that saves fail, until one succeeds; report each loss of files once."""
        if dist.get_rank() != 0:
            return
        failed, folder = checkpoints.failed_saves, Path(self._config.run.dir)
        if not (folder / CONFIG_FILE).exists():
            reason = (
                f"{folder} has lost its {CONFIG_FILE}, and maybe all else: it was removed or "
                "renamed while the run trains in it"
            )
            action = "write what follows there again"
            self.send(_alert(progress, "lost_files", "tokens", condition=reason, action=action))
            with contextlib.suppress(OSError):
                RunFolder(self._config).write_config()
        if checkpoints.error is not None:
            logger.error("step %d: %s (%d failed saves)", progress.step, checkpoints.error, failed)
        if failed > self._reported_failed_saves:
            self._reported_failed_saves = failed
            fields = {"value": failed, "condition": str(checkpoints.last_failure), "action": "warn"}
            self.send(_alert(progress, "failed_save", "failed_saves", **fields))

    def close(self) -> str | None:
        """Close all; one line on records that could not be written, None if all were."""
        self._alerts.close()
        try:
            self._sinks.close()
        except OSError as error:
            return f"the last records of metrics could not be written: {error}"
        return None


def _alert(progress: Progress, rule: str, metric: str, **fields: Any) -> Alert:
    """Make an alert, timed now; `value` is by default that field of `progress`."""
    fields = {"value": getattr(progress, metric, None), "severity": "critical"} | fields
    return Alert(step=progress.step, rule=rule, metric=metric, **fields)


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


def _settings(config: Config, progress: Progress) -> SinkSettings:
    moe = config.moe
    return SinkSettings(
        Path(config.run.dir),
        moe,
        phi=moe.ffn_share,
        total_steps=config.training.train_iters,
        resume_step=progress.step + 1,
        wandb=config.observe.wandb,
        name=config.run.name,
        config=config.model_dump(mode="json"),
        moe_layers=[number for number, is_moe in enumerate(config.router_pattern, 1) if is_moe],
        plugins=config.observe.sinks,
    )
