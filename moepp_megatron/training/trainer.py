"""The training run from start to end: a loop over steps, and a list of parts."""

import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch.distributed as dist

from moepp_megatron.config import Config, Layout
from moepp_megatron.config.choices import pick
from moepp_megatron.data.datasets import DATASETS, build_validation_sets
from moepp_megatron.data.prepared_data import tokenizer_of_run
from moepp_megatron.data.tokenizer import Tokenizer
from moepp_megatron.observe.alerts import Alert
from moepp_megatron.observe.metrics import StepMetrics
from moepp_megatron.training.alerts import RunOutput
from moepp_megatron.training.batches import rank_batches
from moepp_megatron.training.checkpoint.files import Progress, SavedRecord
from moepp_megatron.training.checkpoint.read import (
    find_start,
    newest_valid,
    read_checkpoint,
    start_lines,
)
from moepp_megatron.training.checkpoint.retention import lack_of_space
from moepp_megatron.training.checkpoint.write import CheckpointWriter
from moepp_megatron.training.part import Outcome, PartContext, Parts, Pause, Rollback, Step, Stop
from moepp_megatron.training.parts.order import STATES, build_parts, states_of
from moepp_megatron.training.resilience.supervisor import Supervisor
from moepp_megatron.training.run_folder import checkpoint_folder
from moepp_megatron.training.schedule import BatchSizes
from moepp_megatron.training.setup import TrainingModel, build_training_model
from moepp_megatron.training.signals import StopRequest
from moepp_megatron.training.step import Batches, training_step
from moepp_megatron.training.step_sums import mean_loss

logger = logging.getLogger(__name__)


class Trainer:
    """Trains the model that a configuration describes. Every rank has one.

    Args:
        config: The run's configuration, checked.
        layout: The rank grid; process groups exist.
        callbacks: Get the run's events, before those that `run.callbacks` names.
        loads: `config` with the `checkpoint` that this start loads; None for its own.

    Attributes:
        states: The parts' states in the newest checkpoint by their keys, also of parts that this
            start does not have.
        stopped: Whether the run has saved and ended before its last step.
        pause_reason: Why the run has stopped by itself; None if it has not.
        start_lines: Messages: the checkpoint that the run continues from, and what differs from it.
    """

    def __init__(
        self,
        config: Config,
        layout: Layout,
        callbacks: Sequence[object] = (),
        loads: Config | None = None,
    ) -> None:
        self.config = config
        self.layout = layout
        self._folder = checkpoint_folder(config)
        self.model: TrainingModel = build_training_model(config)
        tokenizer_file = tokenizer_of_run(config)
        build = pick(DATASETS, "data.dataset", config.data.dataset, "datasets")
        tokenizer = Tokenizer.load(tokenizer_file)
        validation = config.training.eval_iters * config.training.global_batch_size
        self._sizes = BatchSizes(config)
        samples = self._sizes.planned_samples(), validation, 0
        self._train_set, valid_set, _ = build(config, tokenizer, samples)
        valid_sets = build_validation_sets(config, tokenizer, validation)
        self.supervisor = Supervisor(config, self.model)
        self.stopped = False
        self.pause_reason: str | None = None
        self._lost_records: str | None = None
        self.checkpoints = CheckpointWriter(self._folder, config, tokenizer_file)
        self.start_lines: list[str] = []
        # Last, so that nothing draws random numbers between here and the first step.
        self.progress, extra = self._load(loads or config)
        self.states = states_of(extra)
        self._run = PartContext(
            config=config,
            layout=layout,
            model=self.model,
            supervisor=self.supervisor,
            tokenizer=tokenizer_file,
            train_set=self._train_set,
            valid_set=valid_set,
            valid_sets=valid_sets,
            progress=self.progress,
            callbacks=callbacks,
        )
        self.parts = Parts(build_parts(self._run))
        self.parts.load(self.states, "resume", self.progress.step)

    def run(self) -> StepMetrics | None:
        """Train to `training.train_iters`; return the metrics of the last logged step, if any."""
        config, parts = self.config, self.parts
        self._output = RunOutput(config, self.progress)
        if dist.get_rank() == 0:
            lack = lack_of_space(config, self._folder, self.progress.step)
            if lack is not None:
                logger.warning("%s", lack)
        batches = rank_batches(
            self._train_set, self.progress.consumed_samples, config, len(self.model.chunks)
        )
        record = None
        self.model.set_training(True)
        with (
            StopRequest().listening() as stop,
            self.supervisor as supervisor,
            parts.running(lambda: self.progress, stop),
        ):
            while self.progress.step < config.training.train_iters and not self.stopped:
                self._enter_stages()
                step = self._take_step(batches, stop)
                if self.checkpoints.is_written():
                    with supervisor.during("save"):
                        self.checkpoints.finish()
                # Reading the loss synchronizes with the device, so only logged steps do it.
                logs = step.updated and self._is_logged(step.number)
                if logs:
                    record = self._record(step)
                is_kept = self._judge(step)
                if is_kept:
                    for part in parts:
                        part.after_step(step, record if logs else None)
                # A request may have come while the host was busy after the step's read. Elsewhere
                # it has only queued the optimizer's work, and the next step's read comes at once.
                asked = stop.seen if is_kept and not logs else stop.agreed()
                self.stopped = asked or self.pause_reason is not None
                saves = is_kept and self._run.is_due(
                    self.progress.step, config.checkpoint.save_interval
                )
                if saves or self.stopped:
                    with supervisor.during("save"):
                        self._save()
                self._announce_saves()
            with supervisor.during("save"):
                self.checkpoints.finish()
                self.checkpoints.check_newest()
                for part in parts:
                    part.write()
            self._announce_saves()
            # No logged step comes after the last save.
            self._output.complain(self.progress, self.checkpoints)
        self._lost_records = self._output.close()
        return record

    @property
    def failure(self) -> str | None:
        """One line on final data that could not be written; None if all of it was."""
        return "; ".join(filter(None, (self.checkpoints.error, self._lost_records))) or None

    def _enter_stages(self) -> None:
        """Reset every part's baseline if the next batch is of a new data stage."""
        reasons = [part.new_data(self.progress.consumed_samples) for part in self.parts]
        for why in filter(None, reasons):
            for part in self.parts:
                self._output.send(*part.reset_baseline(self.progress.step))
            self._output.send(
                Alert(
                    step=self.progress.step,
                    rule="new_stage",
                    metric="tokens",
                    value=self.progress.tokens,
                    condition=why,
                    severity="info",
                    action="both guards start again",
                )
            )

    def _take_step(self, batches: Batches, stop: StopRequest) -> Step:
        """Take the next step, or refuse its batch."""
        before = self.progress
        samples = self._sizes.at(before.consumed_samples)
        layout = self._sizes.layout(self.layout, before.consumed_samples)
        self.supervisor.begin_step(before.step + 1)
        begin = partial(self.parts.begin_step, before.step + 1, layout)
        begin()
        started = time.perf_counter()
        result = training_step(self.model, batches, self.config, layout, self.parts, [stop], begin)
        if result.updated:
            self.progress = before.after_step(samples, samples * self.config.model.seq_length)
        else:
            self.progress = before.after_skip(samples)
        step = Step(self.progress, before.consumed_samples, samples, started, result)
        self._output.send(*self.parts.end_step(step))
        if result.updated:
            self.supervisor.end_step(step.number)
        return step

    def _judge(self, step: Step) -> bool:
        """Let the parts judge a step and act on it; False if the step is undone."""
        for part in self.parts:
            for outcome in part.judge(step):
                if not self._act(outcome):
                    return False
        return step.updated

    def _act(self, outcome: Outcome) -> bool:
        """Carry out a part's request; False if the run was rolled back."""
        match outcome:
            case Rollback():
                return not self._roll_back(outcome)
            case Pause():
                self.pause_reason = outcome.reason
            case Stop():
                with self.supervisor.during("save"):
                    self._save()
                    self.checkpoints.finish()
                saved = f"step {self.progress.step} is saved, and resuming continues after them"
                raise outcome.error(self.checkpoints.error or saved)
            case _:
                self._output.send(outcome)
        return True

    def _roll_back(self, rollback: Rollback) -> bool:
        """Continue from an earlier checkpoint; False if there is none."""
        before = self.progress
        with self.supervisor.during("rollback"):
            self.checkpoints.finish()
            checkpoint = newest_valid(self._folder, rollback.up_to_step)
            self._output.send(*rollback.alerts_before(checkpoint))
            if checkpoint is None:
                return False
            earlier, extra = read_checkpoint(checkpoint, self.model, self.config)
            self.progress, self.states = before.back_at(earlier), states_of(extra)
            self._output.go_back(self.progress.step)
            self._output.send(*self.parts.load(self.states, "rollback", before.step))
            self._output.send(*rollback.alerts_after(checkpoint))
            if rollback.up_to_step is not None:
                # The checkpoints of what is undone are newer than the one gone back to. A run that
                # is resumed must not take them.
                self._save()
        return True

    def _save(self) -> None:
        # A new dictionary, not a changed one: a save under way keeps the old one.
        self.states = {**self.states, **self.parts.state()}
        self.checkpoints.save(self.model, self.progress, {STATES: self.states})
        for part in self.parts:
            part.write()

    def _announce_saves(self) -> None:
        while self.checkpoints.written:
            checkpoint = self.checkpoints.written.pop(0)
            for part in self.parts:
                part.saved(checkpoint)

    def _is_logged(self, step: int) -> bool:
        if self._run.is_due(step, self.config.training.log_interval):
            return True
        return any(part.wants_record(step) for part in self.parts)

    def _record(self, step: Step) -> StepMetrics:
        """Make and write the record of the step just taken, global; every rank must call."""
        loss = mean_loss(step.result.losses)
        elapsed = time.perf_counter() - step.started
        tokens = step.samples * self.config.model.seq_length
        fields: dict[str, Any] = {
            "step": step.number,
            "tokens": self.progress.tokens,
            "loss": loss,
            "lr": self.model.learning_rate,
            "batch_size": None if self.config.training.batch_ramp is None else step.samples,
            "grad_norm": step.result.grad_norm,
            "step_time_s": elapsed,
            "tokens_per_s": tokens / elapsed,
            "skipped_steps": self.progress.skipped_steps or None,
            **self.supervisor.metrics(),
        }
        if self.config.checkpoint.save_interval > 0:
            fields["failed_saves"] = self.checkpoints.failed_saves
        record = StepMetrics(**self.parts.record(step, fields))
        self._output.write(record)
        self._output.complain(self.progress, self.checkpoints)
        return record

    def _load(self, config: Config) -> tuple[Progress, dict[str, Any]]:
        """Continue from `checkpoint.load` of `config`."""
        start = find_start(config, self._folder)
        if start is None:
            return Progress(), {}
        weights_only = not config.checkpoint.load_optimizer
        loaded = read_checkpoint(start, self.model, config, weights_only)
        record = None if weights_only else SavedRecord.read(start)
        self.start_lines = start_lines(start, record, config, self.layout)
        return loaded
