"""The numerical guard as a part of the run: refuses batches and acts on their cause."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, assert_never

import torch.distributed as dist
from torch import Tensor

from moepp_megatron.observe.alerts import Alert
from moepp_megatron.training.alerts import guard_alert
from moepp_megatron.training.batches import rank_batches
from moepp_megatron.training.part import (
    Outcome,
    Part,
    PartContext,
    Pause,
    Rollback,
    State,
    Step,
    Stop,
    Why,
)
from moepp_megatron.training.parts.routing_counts import RoutingCountsPart
from moepp_megatron.training.resilience.numerical_guard import NumericalFailureError, NumericalGuard
from moepp_megatron.training.resilience.refused_batches import BatchEvidence, find_cause
from moepp_megatron.training.schedule import BatchSizes
from moepp_megatron.training.step import compute_gradients, unchanged
from moepp_megatron.training.step_sums import StepSums


class RefusedBatchesPart(Part):
    """Refuses batches with a non-finite or spiking loss; after many in a row, finds out why.

    Args:
        run: The run; `resilience.guard` is on.
    """

    key: ClassVar[str] = "numerical_guard"
    may_refuse = True

    def __init__(self, run: PartContext) -> None:
        self._run, self._counts = run, run.require(RoutingCountsPart)
        self._guard = NumericalGuard(run.config.resilience, run.model.models)
        # Whether enough were refused in a row that their cause must be found.
        self._is_due = False

    @classmethod
    def of(cls, run: PartContext) -> RefusedBatchesPart | None:
        """The part of a run; None without the guard."""
        return cls(run) if run.config.resilience.guard else None

    def refuses(self, sums: StepSums, losses: Tensor) -> bool:
        """Judge a batch before the optimizer acts."""
        return self._guard.refuses(sums, losses)

    def end_step(self, step: Step) -> Iterator[Alert]:
        """Note an accepted batch; report a refused one."""
        if step.updated:
            self._guard.note_accepted(step.first_sample)
            return
        yield guard_alert(step.progress, self._guard.last_reason, "skip_batch")
        self._is_due = self._guard.note_refused(self._counts.selections())
        if many := self._guard.many_refused():
            yield guard_alert(step.progress, many, "warn")

    def judge(self, step: Step) -> Iterator[Outcome]:
        """Go back, accept, pause or stop, by the cause for which batches were refused in a row."""
        if step.updated or not self._is_due:
            return
        guard = self._guard
        with self._run.supervisor.during("replay"):
            before = self._replay(guard.samples_to_replay)
            found = [find_cause(guard.refused, before, guard.is_sound)]
            # The processor of another rank may round otherwise, and all must do the same.
            dist.broadcast_object_list(found)
        (finding,) = found
        what = (
            f"{len(guard.refused)} batches in a row refused ({guard.last_reason}); {finding.text}"
        )
        match guard.action(finding.cause):
            case "rollback":
                yield self._rollback(step, what)
                return
            case "stop":
                yield guard_alert(step.progress, what, "stop")
                guard.forget_refused()
                yield Stop(
                    lambda saved: NumericalFailureError(f"{what}; {saved}; {finding.remedy}")
                )
            case "pause":
                yield guard_alert(step.progress, what, "pause")
                guard.accept_refused()
                yield Pause("paused before new data")
            case "accept":
                yield guard_alert(step.progress, what, "accept")
                guard.accept_refused()
            case other:
                assert_never(other)

    def _rollback(self, step: Step, what: str) -> Rollback:
        def before(checkpoint: Path | None) -> Sequence[Alert]:
            self._guard.begin_rollback(step.number, checkpoint is not None)
            return ()

        def after(checkpoint: Path) -> Sequence[Alert]:
            note = f"{what}; back to {checkpoint.name}"
            return [guard_alert(step.progress, note, "rollback")]

        return Rollback(None, before, after)

    def _replay(self, first_samples: Sequence[int]) -> list[BatchEvidence]:
        """Loss and routing of batches that were trained on, by the current model."""
        run, sizes = self._run, BatchSizes(self._run.config)
        evidence = []
        # Data loaders draw random numbers too.
        with unchanged(run.model):
            for first_sample in first_samples:
                iterators = rank_batches(
                    run.train_set, first_sample, run.config, len(run.model.chunks)
                )
                self._counts.reset()
                layout = sizes.layout(run.layout, first_sample)
                result = compute_gradients(run.model, iterators, run.config, layout)
                evidence.append(BatchEvidence(result.sums.loss, self._counts.selections()))
        return evidence

    def state(self) -> State:
        """Recent losses and batches."""
        return self._guard.state()

    def load(self, state: State, why: Why, step: int) -> Iterable[Alert]:
        """Take over recent losses; after a rollback no refused batch comes before the next."""
        self._guard.load(state)
        if why == "rollback":
            self._guard.forget_refused()
        return ()

    def reset_baseline(self, step: int) -> Iterable[Alert]:
        """Forget the baseline of losses."""
        self._guard.load({})
        return ()
