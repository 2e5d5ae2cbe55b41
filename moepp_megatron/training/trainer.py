"""The training run from start to end."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from moepp_megatron.config import Config, Layout
from moepp_megatron.config.choices import pick
from moepp_megatron.data.datasets import DATASETS, build_validation_sets
from moepp_megatron.data.same_tokenizer import tokenizer_of_run
from moepp_megatron.data.tokenizer import Tokenizer
from moepp_megatron.observe.metrics import StepMetrics
from moepp_megatron.observe.sinks import Sinks
from moepp_megatron.training.alerts import RunAlerts, guard_alert, new_stage
from moepp_megatron.training.batches import rank_batches
from moepp_megatron.training.callbacks import Callback, Callbacks
from moepp_megatron.training.checkpoint import (
    CheckpointWriter,
    Loaded,
    find_start,
    lack_of_room,
    read_checkpoint,
)
from moepp_megatron.training.checkpoint.agree import Agreement
from moepp_megatron.training.checkpoint.progress import read_record
from moepp_megatron.training.collect import mean_loss
from moepp_megatron.training.data_stages import DataStages
from moepp_megatron.training.distillation import Distillation
from moepp_megatron.training.evaluate import Validation
from moepp_megatron.training.further_tokens import FurtherTokens
from moepp_megatron.training.going_back import go_back, newest_checkpoint
from moepp_megatron.training.profiler import StepRecorder
from moepp_megatron.training.replay import replay
from moepp_megatron.training.resilience.numerical_guard import (
    NumericalFailureError,
    NumericalGuard,
)
from moepp_megatron.training.resilience.refused_batches import find_cause
from moepp_megatron.training.resilience.supervisor import Supervisor
from moepp_megatron.training.resumed import start_lines
from moepp_megatron.training.routers import Routers
from moepp_megatron.training.run_folder import RunFolder, checkpoint_folder
from moepp_megatron.training.run_sinks import open_run_sinks
from moepp_megatron.training.schedule import BatchSizes, planned_samples
from moepp_megatron.training.setup import TrainingModel, build_training_model
from moepp_megatron.training.signals import StopRequest
from moepp_megatron.training.step import Batch, StepResult, training_step, unchanged
from moepp_megatron.training.task_evaluation import TaskEvaluation
from moepp_megatron.training.teacher import TeacherModel
from moepp_megatron.training.telemetry import Telemetry

logger = logging.getLogger(__name__)


class Trainer:
    """Trains the model that a configuration describes. Every rank has one.

    Args:
        config: The run's configuration, checked.
        layout: The rank grid; process groups exist.
        callbacks: Told what the run does, before those that `run.callbacks` names.

    Attributes:
        progress: The run's progress.
        extra: Further state that checkpoints hold, the same on every rank.
        stopped: Whether the run has saved and ended before its last step.
        pause_reason: Why the run has stopped by itself; None if it has not.
        checkpoints: Writes them; says whether saves failed.
        start_lines: Messages: the checkpoint that the run continues from, and what differs from it.
    """

    def __init__(self, config: Config, layout: Layout, callbacks: Sequence[Callback] = ()) -> None:
        self.config = config
        self.layout = layout
        self.model: TrainingModel = build_training_model(config)
        self._tokenizer = tokenizer_of_run(config)
        build = pick(DATASETS, "data.dataset", config.data.dataset, "datasets")
        tokenizer, samples = Tokenizer.load(self._tokenizer), self._num_samples()
        self._train_set, valid_set, _ = build(config, tokenizer, samples)
        named = build_validation_sets(config, tokenizer, samples[1])
        self._validation = Validation(valid_set, named)
        self._distillation = self._teach()
        self._supervisor = Supervisor(config, self.model)
        self._sizes = BatchSizes(config)
        self._samples = 0  # of the newest step
        self.stopped = False
        self.pause_reason: str | None = None
        self._sinks: Sinks | None = None
        self._lost_records: str | None = None
        self._alerts = RunAlerts()
        self.checkpoints = CheckpointWriter(checkpoint_folder(config), config, self._tokenizer)
        self.start_lines: list[str] = []
        # Last, so that nothing draws random numbers between here and the first step.
        loaded = self._load()
        self.progress, self.extra = loaded.progress, loaded.extra
        self._stages = DataStages(config, self.extra, self.progress.consumed_samples)
        if self._distillation is not None:
            self._distillation.check_same(self.extra)
        if self._supervisor.guard is not None:
            self._supervisor.guard.load(self.extra)
        self._routers = Routers(config, self.model, layout, self.extra, self._train_set)
        self._further_tokens = FurtherTokens(self.model, config.model.mtp_num_layers)
        self._telemetry = Telemetry(config, self.progress.tokens)
        self._recorder = StepRecorder(config, layout, self.model)
        self._tasks: TaskEvaluation | None = None
        if config.evaluation.tasks:
            parts = (self.model, layout, self._tokenizer, self._supervisor)
            self._tasks = TaskEvaluation(config, *parts)
        self._callbacks = Callbacks(config, self.model, self._supervisor, callbacks)

    def run(self) -> StepMetrics | None:
        """Train to `training.train_iters`.

        Returns:
            The last step's metrics; None if there was nothing left to do.
        """
        config, training = self.config, self.config.training
        self._open_sinks()
        batches = rank_batches(
            self._train_set, self.progress.consumed_samples, config, len(self.model.chunks)
        )
        record = None
        self.model.set_training(True)
        with (
            StopRequest().listening() as stop,
            self._supervisor as supervisor,
            self._telemetry,
            self._callbacks.following(lambda: self.progress, stop) as callbacks,
        ):
            while self.progress.step < training.train_iters and not self.stopped:
                if (why := self._stages.enter(self.progress.consumed_samples)) is not None:
                    self.announce_stage(why)
                result, started = self._take_step(batches, stop)
                if self.checkpoints.is_written():
                    with supervisor.during("save"):
                        self.checkpoints.finish()
                # The loss is needed by the log alone, but reading it waits for the device: so the
                # time of the step is its own.
                logs = result.updated and any(
                    (self._due(training.log_interval), self._validates(), self._does_tasks())
                )
                if logs:
                    record = self._record(result.losses, result.grad_norm, started)
                    if self._sinks is not None:
                        self._sinks.write(record)
                        self._alerts.complain(self.progress, self.checkpoints)
                stays = self._judge_routers(result) if result.updated else self._skip(result)
                if stays and result.updated:
                    callbacks.tell_step(record if logs else None)
                # A request may have come while the host was busy after the step's read. Elsewhere
                # it has only queued the optimizer's work, and the next step's read comes at once.
                is_plain = result.updated and stays and not logs
                asked = stop.seen if is_plain else stop.agreed()
                self.stopped = asked or self.pause_reason is not None
                if stays and self._due(config.checkpoint.save_interval) or self.stopped:
                    with supervisor.during("save"):
                        self._save()
                callbacks.tell_saves(self.checkpoints.written)
            self._recorder.close()
            with supervisor.during("save"):
                self.checkpoints.finish()
                self.checkpoints.check_newest()
                self._routers.write_expert_usage()
            callbacks.tell_saves(self.checkpoints.written)
            # No logged step comes after the last save.
            self._alerts.complain(self.progress, self.checkpoints)
        self._close_sinks()
        return record

    @property
    def failure(self) -> str | None:
        """One line on data of the run's end that could not be written; None if all of it was."""
        return "; ".join(filter(None, (self.checkpoints.error, self._lost_records))) or None

    def _open_sinks(self) -> None:
        """Open what the run writes beside checkpoints, on the ranks that write it."""
        config = self.config
        if dist.get_rank() == 0:
            RunFolder(config).write_config()
        self._sinks = open_run_sinks(config, self.progress)
        if self._sinks is not None:
            self._alerts.open(config, self._sinks, self.progress)
            lack = lack_of_room(config, checkpoint_folder(config), self.progress.step)
            if lack is not None:
                logger.warning("%s", lack)

    def _take_step(
        self, batches: list[Iterator[Batch]], stop: StopRequest
    ) -> tuple[StepResult, float]:
        """Take the next step, and count it unless its batch is refused.

        Returns:
            The step's result, and `time.perf_counter` at its beginning.
        """
        supervisor, step = self._supervisor, self.progress.step + 1
        supervisor.begin_step(step)
        self._recorder.begin_step(step)
        started = time.perf_counter()
        layout = self._sizes.layout(self.layout, self.progress.consumed_samples)
        self._routers.begin_step(step, layout.num_microbatches)
        self._further_tokens.reset()
        result = training_step(
            self.model,
            batches,
            self.config,
            layout,
            supervisor.guard,
            self._routers.watch_losses,
            [stop, *self._routers.summands()],
            self._distillation,
        )
        self._recorder.end_step()
        if result.updated:
            self._advance()
        self._alerts.send(*self._routers.learn(self.progress.step, result))
        if result.updated:
            supervisor.end_step(self.progress.step)
        return result, started

    def _close_sinks(self) -> None:
        self._alerts.close()
        if self._sinks is None:
            return
        try:
            self._sinks.close()
        except OSError as error:
            self._lost_records = f"the last records of metrics could not be written: {error}"

    def _save(self) -> None:
        # A new dictionary, not a changed one: a save under way keeps the old one.
        self.extra = {**self.extra, **self._stages.state(), **self._routers.state()}
        if self._supervisor.guard is not None:
            self.extra |= self._supervisor.guard.state()
        if self._distillation is not None:
            self.extra |= self._distillation.state()
        self.checkpoints.save(self.model, self.progress, self.extra)
        self._routers.write_expert_usage()

    def _advance(self) -> None:
        self._samples = samples = self._batch_size()
        if self._supervisor.guard is not None:
            self._supervisor.guard.note_accepted(self.progress.consumed_samples)
        self.progress = self.progress.after_step(samples, samples * self.config.model.seq_length)

    def _batch_size(self) -> int:
        """Sequences of the batch that is read next, over all ranks."""
        return self._sizes.at(self.progress.consumed_samples)

    def announce_stage(self, why: str) -> None:
        """Tell both guards that other data follow: they begin anew. Every rank must call."""
        if self._supervisor.guard is not None:
            self._supervisor.guard.load({})
        alerts = self._routers.announce_stage(self.progress.step)
        self._alerts.send(*alerts, new_stage(self.progress, why))

    def _skip(self, result: StepResult) -> bool:
        """Skip a refused batch; after too many in a row, act on their cause. No step stays."""
        guard = self._supervisor.guard
        assert guard is not None, "only the guard refuses batches"
        self.progress = self.progress.after_skip(self._batch_size())
        self._alerts.send(guard_alert(self.progress, guard.last_reason, "skip_batch"))
        is_due = guard.note_refused(self._routers.selections())
        if many := guard.many_refused():
            self._alerts.send(guard_alert(self.progress, many, "warn"))
        if self._judge_routers(result) and is_due:
            self._settle(guard)
        return False

    def _settle(self, guard: NumericalGuard) -> None:
        """Go back, go on, pause or stop, by the cause for which batches were refused in a row."""
        parts = (self.model, self._routers, self._train_set, self.config, self.layout)
        with self._supervisor.during("replay"):
            before = replay(*parts, guard.samples_to_replay)
            finding = find_cause(guard.refused, before, guard.is_usual)
        action = guard.action(finding.cause)
        what = (
            f"{len(guard.refused)} batches in a row refused ({guard.last_reason}); {finding.text}"
        )
        if action == "rollback":
            with self._supervisor.during("rollback"):
                self._roll_back(guard, what)
            return
        self._alerts.send(guard_alert(self.progress, what, action))
        if action == "stop":
            guard.forget_refused()
            with self._supervisor.during("save"):
                self._save()
                self.checkpoints.finish()
            saved = f"step {self.progress.step} is saved, and resuming goes on after them"
            raise NumericalFailureError(
                f"{what}; {self.checkpoints.error or saved}; {finding.remedy}"
            )
        guard.accept_refused()
        self.pause_reason = {"accept": None, "pause": "paused before new data"}[action]

    def _judge_routers(self, result: StepResult) -> bool:
        """Let the routing guard judge the step just taken; False if the run has gone back."""
        step = self.progress.step
        verdict = self._routers.judge(step, result)
        self._alerts.send(*verdict.alerts)
        if not verdict.rollbacks:
            return True
        with self._supervisor.during("rollback"):
            newest = step - verdict.healthy_steps_ago
            checkpoint = newest_checkpoint(self.config, self.checkpoints, newest)
            self._alerts.send(*verdict.rollback_alerts(step, checkpoint, newest))
            if checkpoint is None:
                return True
            self._go_back(checkpoint)
            # The checkpoints of what is undone are newer than the one gone back to. A run that is
            # resumed must not take them.
            self._save()
        return False

    def _roll_back(self, guard: NumericalGuard, reason: str) -> None:
        """The numerical guard goes back to the newest checkpoint."""
        before = self.progress
        checkpoint = newest_checkpoint(self.config, self.checkpoints)
        guard.begin_rollback(before.step, checkpoint is not None)
        assert checkpoint is not None, "begin_rollback raises without one"
        self._go_back(checkpoint)
        self._alerts.send(guard_alert(before, f"{reason}; back to {checkpoint.name}", "rollback"))

    def _go_back(self, checkpoint: Path) -> None:
        before = self.progress
        self.progress, self.extra = go_back(checkpoint, self.model, self.config, before)
        if self._sinks is not None:
            self._sinks.go_back(self.progress.step)
        self._alerts.send(*self._routers.go_back(before.step, self.extra))
        self._stages.go_back(self.extra)
        if self._supervisor.guard is not None:
            self._supervisor.guard.load(self.extra)
            self._supervisor.guard.forget_refused()

    def _due(self, interval: int) -> bool:
        """Whether an action that happens every `interval` steps, and at the end, is due now."""
        step = self.progress.step
        at_end = step == self.config.training.train_iters
        return interval > 0 and (step % interval == 0 or at_end)

    def _does_tasks(self) -> bool:
        if self._tasks is None:
            return False
        is_last = self.progress.step == self.config.training.train_iters
        return is_last or self._due(self.config.evaluation.interval)

    def _validates(self) -> bool:
        training = self.config.training
        if not self._validation.exists or training.eval_iters == 0:
            return False
        return self.progress.step == training.train_iters or self._due(training.eval_interval)

    def _record(self, losses: Tensor, grad_norm: float, started: float) -> StepMetrics:
        """The metrics of the step just taken, global; every rank must call."""
        loss = mean_loss(losses)
        elapsed = time.perf_counter() - started
        tokens = self._samples * self.config.model.seq_length
        routing = self._routers.routing_metrics()
        validation: dict[str, Any] = {}
        if self._validates():
            with self._supervisor.during("evaluation"):
                validation = self._validation.losses(self.model, self.config, self.layout)
        if self._does_tasks():
            assert self._tasks is not None, "there are tasks to do"
            validation["task_score"] = self._tasks.scores()
        ffn_fraction: float = routing["ffn_fraction"]
        telemetry = self._telemetry.metrics(self.progress.tokens, tokens / elapsed, ffn_fraction)
        return StepMetrics(
            step=self.progress.step,
            tokens=self.progress.tokens,
            loss=loss,
            lr=self.model.learning_rate,
            batch_size=None if self.config.training.batch_ramp is None else self._samples,
            grad_norm=grad_norm,
            step_time_s=elapsed,
            tokens_per_s=tokens / elapsed,
            **validation,
            distillation_loss=None if self._distillation is None else self._distillation.mean,
            skipped_steps=self.progress.skipped_steps or None,
            **self._supervisor.metrics(),  # type: ignore[arg-type]
            failed_saves=self.checkpoints.failed_saves if self._saves() else None,
            **routing,
            **self._routers.metrics(self.progress.step),
            **self._further_tokens.metrics(),
            **telemetry,
        )

    def _saves(self) -> bool:
        return self.config.checkpoint.save_interval > 0

    def _num_samples(self) -> tuple[int, int, int]:
        training = self.config.training
        validation = training.eval_iters * training.global_batch_size
        return planned_samples(self.config), validation, 0

    def _teach(self) -> Distillation | None:
        if self.config.distillation.teacher is None:
            return None
        # A run that teaches may save between the looks of two ranks.
        teacher = Agreement().from_first(TeacherModel.of(self.config))
        with unchanged(self.model):
            return Distillation(self.config, teacher)

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
