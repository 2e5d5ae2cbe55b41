"""The training run from start to end."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from moepp_megatron.config import Config, Layout
from moepp_megatron.data.datasets import build_datasets
from moepp_megatron.data.same_tokenizer import tokenizer_of_run
from moepp_megatron.data.tokenizer import Tokenizer
from moepp_megatron.observe.alerts import Alert, AlertSinks
from moepp_megatron.observe.metrics import StepMetrics
from moepp_megatron.observe.sinks import Sinks
from moepp_megatron.training.alerts import (
    batch_skipped,
    open_run_alerts,
    rolled_back,
    save_failed,
)
from moepp_megatron.training.batches import rank_batches
from moepp_megatron.training.checkpoint import (
    CheckpointWriter,
    Loaded,
    find_start,
    lack_of_room,
    read_checkpoint,
)
from moepp_megatron.training.checkpoint.progress import read_record
from moepp_megatron.training.collect import mean_loss
from moepp_megatron.training.evaluate import validation_loss
from moepp_megatron.training.going_back import go_back, newest_checkpoint
from moepp_megatron.training.profiler import StepRecorder
from moepp_megatron.training.resilience.supervisor import Supervisor
from moepp_megatron.training.resumed import start_lines
from moepp_megatron.training.routers import Routers
from moepp_megatron.training.run_folder import checkpoint_folder, write_config
from moepp_megatron.training.run_sinks import open_run_sinks
from moepp_megatron.training.setup import TrainingModel, build_training_model
from moepp_megatron.training.signals import StopRequest
from moepp_megatron.training.step import StepResult, training_step
from moepp_megatron.training.telemetry import Telemetry

logger = logging.getLogger(__name__)


class Trainer:
    """Trains the model that a configuration describes. Every rank has one.

    Args:
        config: The run's configuration, checked.
        layout: The rank grid; process groups exist.

    Attributes:
        progress: The run's progress.
        extra: Further state that checkpoints hold, the same on every rank.
        checkpoints: Writes them; says whether saves failed.
        start_lines: Messages: the checkpoint that the run continues from, and what differs from it.
    """

    def __init__(self, config: Config, layout: Layout) -> None:
        self.config = config
        self.layout = layout
        self.model: TrainingModel = build_training_model(config)
        assert config.data.path is not None, "training needs data.path"
        self._tokenizer = tokenizer_of_run(config)
        self._train_set, self._valid_set, _ = build_datasets(
            Path(config.data.path),
            Tokenizer.load(self._tokenizer),
            config.model.seq_length,
            config.data.split,
            config.training.seed,
            self._num_samples(),
        )
        self._supervisor = Supervisor(config, self.model)
        self.stopped = False
        self._sinks: Sinks | None = None
        self._lost_records: str | None = None
        self._alerts: AlertSinks | None = None
        self._told_failed_saves = 0
        self.checkpoints = CheckpointWriter(checkpoint_folder(config), config, self._tokenizer)
        self.start_lines: list[str] = []
        # Last, so that nothing draws random numbers between here and the first step.
        loaded = self._load()
        self.progress, self.extra = loaded.progress, loaded.extra
        self._routers = Routers(config, self.model, layout, self.extra, self._train_set)
        self._telemetry = Telemetry(config, self.progress.tokens)
        self._recorder = StepRecorder(config, layout, self.model)

    def run(self) -> StepMetrics | None:
        """Train to `training.train_iters`.

        Returns:
            The last step's metrics; None if there was nothing left to do.
        """
        config, training = self.config, self.config.training
        if dist.get_rank() == 0:
            write_config(config)
        sinks = self._sinks = open_run_sinks(config, self.progress)
        if sinks is not None:
            self._alerts = open_run_alerts(config, sinks, self.progress)
            lack = lack_of_room(config, checkpoint_folder(config), self.progress.step)
            if lack is not None:
                logger.warning("%s", lack)
        batches = rank_batches(
            self._train_set, self.progress.consumed_samples, config, len(self.model.chunks)
        )
        record = None
        self.model.set_training(True)
        self._share_losses_with_guard()
        with StopRequest().listening() as stop, self._supervisor as supervisor, self._telemetry:
            while self.progress.step < training.train_iters and not self.stopped:
                supervisor.begin_step(self.progress.step + 1)
                self._recorder.begin_step(self.progress.step + 1)
                started = time.perf_counter()
                self._routers.begin_step(self.progress.step + 1)
                result = training_step(
                    self.model,
                    batches,
                    config,
                    self.layout,
                    supervisor.guard,
                    self._routers.watch_losses,
                )
                self._recorder.end_step()
                if result.updated:
                    self._advance()
                    self._routers.learn(self.progress.step, result)
                    supervisor.end_step(self.progress.step)
                else:
                    self._skip()
                self.checkpoints.poll()
                # The loss is needed by the log alone, but reading it waits for the device: so the
                # time of the step is its own.
                if result.updated and (self._due(training.log_interval) or self._evaluates()):
                    record = self._record(result.losses, result.grad_norm, started)
                    if sinks is not None:
                        sinks.write(record)
                        self._complain()
                stays = result.updated and self._judge_routers(result)
                self.stopped = stop.agreed()
                if stays and self._due(config.checkpoint.save_interval) or self.stopped:
                    with supervisor.during("save"):
                        self._save()
            self._recorder.close()
            with supervisor.during("save"):
                self.checkpoints.finish()
                self._routers.write_profile()
            if sinks is not None:
                # No logged step comes after the last save.
                self._complain()
        if self._alerts is not None:
            self._alerts.close()
        if sinks is not None:
            self._close(sinks)
        return record

    @property
    def failure(self) -> str | None:
        """One line on data of the run's end that could not be written; None if all of it was."""
        return "; ".join(filter(None, (self.checkpoints.error, self._lost_records))) or None

    def _close(self, sinks: Sinks) -> None:
        try:
            sinks.close()
        except OSError as error:
            self._lost_records = f"the last records of metrics could not be written: {error}"

    def _alert(self, alert: Alert) -> None:
        """Raise alerts, on the rank that owns the sinks."""
        if self._alerts is not None:
            self._alerts.send(alert)

    def _complain(self) -> None:
        """Repeat with every logged step that the last save failed, until one succeeds."""
        if self.checkpoints.error is not None:
            logger.error(
                "step %d: %s (%d failed saves)",
                self.progress.step,
                self.checkpoints.error,
                self.checkpoints.failed_saves,
            )
            if self.checkpoints.failed_saves > self._told_failed_saves:
                self._told_failed_saves = self.checkpoints.failed_saves
                self._alert(
                    save_failed(self.progress, self._told_failed_saves, self.checkpoints.error)
                )

    def _save(self) -> None:
        # A new dictionary, not a changed one: a save under way keeps the old one.
        self.extra = {**self.extra, **self._routers.state()}
        self.checkpoints.save(self.model, self.progress, self.extra)
        self._routers.write_profile()

    def _advance(self) -> None:
        samples = self.config.training.global_batch_size
        self.progress = self.progress.after_step(samples, samples * self.config.model.seq_length)

    def _skip(self) -> None:
        """Skip the batch of a refused step; after too many in a row, go back."""
        guard = self._supervisor.guard
        assert guard is not None, "only the guard refuses steps"
        self.progress = self.progress.after_skip(self.config.training.global_batch_size)
        self._alert(batch_skipped(self.progress, guard.last_reason))
        if guard.must_roll_back:
            with self._supervisor.during("rollback"):
                self._roll_back()

    def _judge_routers(self, result: StepResult) -> bool:
        """Let the routing guard judge the step just taken; False if the run has gone back."""
        step = self.progress.step
        verdict = self._routers.judge(step, result)
        for alert in verdict.alerts:
            self._alert(alert)
        if not verdict.rollbacks:
            return True
        with self._supervisor.during("rollback"):
            newest = step - verdict.healthy_steps_ago
            checkpoint = newest_checkpoint(self.config, self.checkpoints, newest)
            for alert in verdict.rollback_alerts(step, checkpoint, newest):
                self._alert(alert)
            if checkpoint is None:
                return True
            self._go_back(checkpoint)
            # The checkpoints of what is undone are newer than the one gone back to. A run that is
            # resumed must not take them.
            self._save()
        return False

    def _roll_back(self) -> None:
        """The numerical guard goes back to the newest checkpoint."""
        guard, before = self._supervisor.guard, self.progress
        assert guard is not None, "only the guard asks to go back"
        checkpoint = newest_checkpoint(self.config, self.checkpoints)
        guard.begin_rollback(before.step, checkpoint is not None)
        assert checkpoint is not None, "begin_rollback raises without one"
        self._go_back(checkpoint)
        self._alert(rolled_back(before, f"{guard.last_reason}; back to {checkpoint.name}"))

    def _go_back(self, checkpoint: Path) -> None:
        before = self.progress
        self.progress, self.extra = go_back(checkpoint, self.model, self.config, before)
        if self._sinks is not None:
            self._sinks.go_back(self.progress.step)
        for alert in self._routers.go_back(before.step, self.extra):
            self._alert(alert)
        self._share_losses_with_guard()

    def _share_losses_with_guard(self) -> None:
        """Share the guard's losses with checkpoints, so that a resumed run judges alike."""
        if self._supervisor.guard is not None:
            self._supervisor.guard.recent_losses = self.extra.setdefault("recent_losses", [])

    def _due(self, interval: int) -> bool:
        """Whether an action that happens every `interval` steps, and at the end, is due now."""
        step = self.progress.step
        at_end = step == self.config.training.train_iters
        return interval > 0 and (step % interval == 0 or at_end)

    def _evaluates(self) -> bool:
        training = self.config.training
        if self._valid_set is None or training.eval_iters == 0:
            return False
        return self.progress.step == training.train_iters or self._due(training.eval_interval)

    def _record(self, losses: Tensor, grad_norm: float, started: float) -> StepMetrics:
        """The metrics of the step just taken, global; every rank must call."""
        loss = mean_loss(losses)
        elapsed = time.perf_counter() - started
        tokens = self.config.training.global_batch_size * self.config.model.seq_length
        routing = self._routers.routing_metrics()
        valid_loss = None
        if self._evaluates():
            with self._supervisor.during("evaluation"):
                valid_loss = validation_loss(self.model, self._valid_set, self.config, self.layout)
        ffn_fraction: float = routing["ffn_fraction"]
        telemetry = self._telemetry.metrics(self.progress.tokens, tokens / elapsed, ffn_fraction)
        return StepMetrics(
            step=self.progress.step,
            tokens=self.progress.tokens,
            loss=loss,
            lr=self.model.optimizer.param_groups[0]["lr"],
            grad_norm=grad_norm,
            step_time_s=elapsed,
            tokens_per_s=tokens / elapsed,
            valid_loss=valid_loss,
            skipped_steps=self.progress.skipped_steps or None,
            **self._supervisor.metrics(),  # type: ignore[arg-type]
            failed_saves=self.checkpoints.failed_saves if self._saves() else None,
            **routing,
            **self._routers.metrics(self.progress.step),
            **telemetry,
        )

    def _saves(self) -> bool:
        return self.config.checkpoint.save_interval > 0

    def _num_samples(self) -> tuple[int, int, int]:
        training = self.config.training
        batch = training.global_batch_size
        return training.train_iters * batch, training.eval_iters * batch, 0

    def _load(self) -> Loaded:
        """Continue from `checkpoint.load`."""
        start = find_start(self.config, checkpoint_folder(self.config))
        if start is None:
            return Loaded()
        weights_only = not self.config.checkpoint.load_optimizer
        loaded = read_checkpoint(start, self.model, self.config, weights_only)
        record = None if weights_only else read_record(start)
        self.start_lines = start_lines(start, record, self.config, self.layout)
        return loaded
