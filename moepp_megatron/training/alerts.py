"""A run's records and alerts, and alerts about failed saves and lost files."""

import contextlib
import logging
from pathlib import Path

import torch.distributed as dist

from moepp_megatron.config import Config
from moepp_megatron.file_names import CONFIG_FILE
from moepp_megatron.observe.alert_sinks import AlertSinks
from moepp_megatron.observe.alerts import Alert
from moepp_megatron.observe.metrics import StepMetrics
from moepp_megatron.observe.sinks import Sinks, SinkSettings
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
            layers = enumerate(config.router_pattern, 1)
            self._sinks = Sinks.open(
                SinkSettings(
                    Path(config.run.dir),
                    config.moe,
                    phi=config.moe.ffn_share,
                    total_steps=config.training.train_iters,
                    resume_step=progress.step + 1,
                    wandb=config.observe.wandb,
                    name=config.run.name,
                    config=config.model_dump(mode="json"),
                    moe_layers=[number for number, is_moe in layers if is_moe],
                    plugins=config.observe.sinks,
                )
            )
            self._alerts = AlertSinks.open(
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
            self.send(
                Alert(
                    step=progress.step,
                    rule="lost_files",
                    metric="tokens",
                    value=progress.tokens,
                    condition=reason,
                    severity="critical",
                    action="write what follows there again",
                )
            )
            with contextlib.suppress(OSError):
                RunFolder(self._config).write_config()
        if checkpoints.error is not None:
            logger.error("step %d: %s (%d failed saves)", progress.step, checkpoints.error, failed)
        if failed > self._reported_failed_saves:
            self._reported_failed_saves = failed
            self.send(
                Alert(
                    step=progress.step,
                    rule="failed_save",
                    metric="failed_saves",
                    value=failed,
                    condition=str(checkpoints.last_failure),
                    severity="critical",
                    action="warn",
                )
            )

    def close(self) -> str | None:
        """Close all; one line on records that could not be written, None if all were."""
        self._alerts.close()
        try:
            self._sinks.close()
        except OSError as error:
            return f"the last records of metrics could not be written: {error}"
        return None
