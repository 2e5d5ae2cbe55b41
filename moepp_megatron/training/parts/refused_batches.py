"""The numerical guard as a part of the run: refuses batches, finds the cause and acts on it."""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import assert_never

import torch
import torch.distributed as dist
from torch import Tensor

from moepp_megatron.observe.alerts import Alert
from moepp_megatron.training.batches import rank_batches
from moepp_megatron.training.checkpoint.files import Progress
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
from moepp_megatron.training.resilience.numerical_guard import (
    SIGNIFICANCE,
    BatchEvidence,
    Cause,
    NumericalFailureError,
    NumericalGuard,
    num_needed,
)
from moepp_megatron.training.schedule import BatchSizes
from moepp_megatron.training.step import compute_gradients, unchanged
from moepp_megatron.training.step_sums import StepSums

_PERMUTATIONS = 400
# Meaning of each cause, and the user's remedy where it has ended a run.
_MEANING: dict[Cause, str] = {
    "model": "the model is at fault",
    "not finite": "the model is sound",
    "data": "the data have changed",
    "targets": "the texts are as before, but not the labels",
}
_REMEDY: dict[Cause, str] = {
    "not finite": "look at the texts of these batches, and at precision",
    "data": "resilience.guard_new_data=accept takes such batches",
    "targets": "look at how these texts were prepared; resilience.guard=false takes them",
}

# What to do about refused batches, by action.
_ADVICE = {
    "skip_batch": "look at the texts of the batch if others follow",
    "warn": "see what the texts of these batches have in common",
    "rollback": "lower optimizer.lr if it happens again",
    "accept": "if the data were not meant to change, stop and mend their source",
    "pause": "resume the run if these data are meant; else mend their source",
    "stop": "look at the texts of these batches and at how they were prepared",
}


class RefusedBatchesPart(Part):
    """Refuses batches with a non-finite or spiking loss; after many in a row, finds out why."""

    key = "numerical_guard"
    may_refuse = True

    def __init__(self, run: PartContext) -> None:
        self._run, self._counts = run, run.require(RoutingCountsPart)
        self._guard = NumericalGuard(run.config.resilience, run.model.models)
        # Whether enough were refused in a row that their cause must be found.
        self._is_due = False

    @staticmethod
    def is_wanted(run: PartContext) -> bool:
        """True with the numerical guard."""
        return run.config.resilience.guard

    def refuses(self, sums: StepSums, losses: Tensor) -> bool:
        """Judge a batch before the optimizer acts."""
        return self._guard.refuses(sums, losses)

    def end_step(self, step: Step) -> Iterator[Alert]:
        """Note an accepted batch; report a refused one."""
        if step.updated:
            self._guard.note_accepted(step.first_sample)
            return
        yield _alert(step.progress, self._guard.last_reason, "skip_batch")
        self._is_due = self._guard.note_refused(self._counts.selections())
        if many := self._guard.many_refused():
            yield _alert(step.progress, many, "warn")

    def judge(self, step: Step) -> Iterator[Outcome]:
        """Go back, accept, pause or stop, by the cause for which batches were refused in a row."""
        if step.updated or not self._is_due:
            return
        guard = self._guard
        with self._run.supervisor.during("replay"):
            before = self._replay(guard.samples_to_replay)
            found = [_find_cause(guard.refused, before, guard.is_sound)]
            # The processor of another rank may round otherwise, and all must do the same.
            dist.broadcast_object_list(found)
        (finding,) = found
        what = (
            f"{len(guard.refused)} batches in a row refused ({guard.last_reason}); "
            f"{finding.numbers}: {_MEANING[finding.cause]}"
        )
        match guard.action(finding.cause):
            case "rollback":
                yield self._rollback(step, what)
            case "stop":
                yield _alert(step.progress, what, "stop")
                guard.forget_refused()
                remedy = _REMEDY[finding.cause]
                yield Stop(lambda saved: NumericalFailureError(f"{what}; {saved}; {remedy}"))
            case "pause" | "accept" as action:
                yield _alert(step.progress, what, action)
                guard.accept_refused()
                if action == "pause":
                    yield Pause("paused before new data")
            case other:
                assert_never(other)

    def _rollback(self, step: Step, what: str) -> Rollback:
        def before(checkpoint: Path | None) -> Sequence[Alert]:
            self._guard.begin_rollback(step.number, checkpoint is not None)
            return ()

        def after(checkpoint: Path) -> Sequence[Alert]:
            note = f"{what}; back to {checkpoint.name}"
            return [_alert(step.progress, note, "rollback")]

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


def _alert(progress: Progress, reason: str, action: str) -> Alert:
    """Report that the guard refused a batch, or acts on many; `progress` is from before."""
    return Alert(
        step=progress.step,
        rule="numerical_guard",
        metric="skipped_steps",
        value=progress.skipped_steps,
        condition=reason,
        severity="critical" if action in ("rollback", "stop", "warn") else "warning",
        action=action,
        remedy=f"{_ADVICE[action]} (docs/guard.md#batches-that-are-refused)",
    )


@dataclass(frozen=True)
class _Finding:
    """A cause of refused batches, with the evidence as text."""

    cause: Cause
    numbers: str


def _find_cause(
    refused: Sequence[BatchEvidence],
    before: Sequence[BatchEvidence],
    is_sound: Callable[[float], bool],
) -> _Finding:
    """Find out why batches were refused, from the current model's judgement of them."""
    # The model has not changed since the newest batch that it accepted. If it does not take batches
    # from then (`before`, maybe none) any more, it was damaged by its last steps. If it does, the
    # refused batches are at fault; and if these are also routed otherwise, they are other texts.
    usual = _median([batch.loss for batch in before])
    numbers = f"batches from before them have a loss of {usual:.4f} now"
    if not before:
        numbers = "no batch before them was accepted"
    if not math.isfinite(usual) or not is_sound(usual):
        return _Finding("model", numbers)
    if not all(math.isfinite(batch.loss) for batch in refused):
        return _Finding("not finite", numbers)
    groups = [[batch.selections_LE for batch in each] for each in (before, refused)]
    numbers += f"; {_moved_share(before, refused):.0%} of the selections are for other experts"
    return _Finding("data" if _has_moved(*groups) else "targets", numbers)


def _median(losses: Sequence[float]) -> float:
    """The median, NaN counting as infinite; NaN of nothing."""
    known = [math.inf if math.isnan(loss) else loss for loss in losses]
    return statistics.median(known) if known else math.nan


def _has_moved(before: Sequence[Tensor], refused: Sequence[Tensor]) -> bool:
    """True if two groups of [MoE layers, E] selections differ significantly in expert shares."""
    # A permutational analysis of variance (Anderson 2001) of Hellinger distances, of all layers
    # together. It needs no scale of what is usual: under the same model batches of the same texts
    # can be exchanged.
    points = torch.stack([_shares(batch).sqrt().flatten() for batch in (*before, *refused)])
    # Seeded, so that every rank decides alike.
    generator = torch.Generator().manual_seed(0)
    orders = torch.stack(
        [torch.randperm(len(points), generator=generator) for _ in range(_PERMUTATIONS)]
    )
    # [1 + permutations, batches] which batches make the first group, the observed one first.
    groups = torch.cat([torch.arange(len(points)).unsqueeze(0), orders]) < len(before)
    one = groups.double() @ points / len(before)
    other = (~groups).double() @ points / len(refused)
    # With groups of fixed sizes the sum of squares between them is a multiple of this.
    between = (one - other).square().sum(dim=1)
    # The same grouping comes again; rounding must not put it above itself.
    above = between[1:] > between[0] * (1 + 1e-9)
    is_enough = len(before) >= num_needed(len(refused))
    return is_enough and float(above.double().mean()) <= SIGNIFICANCE


def _shares(selections_LE: Tensor) -> Tensor:
    return selections_LE / selections_LE.sum(dim=1, keepdim=True).clamp(min=1.0)


def _moved_share(batches: Sequence[BatchEvidence], other: Sequence[BatchEvidence]) -> float:
    """Total variation distance of the experts' shares, mean over the layers."""
    one, two = (
        _shares(torch.stack([batch.selections_LE for batch in each]).sum(dim=0))
        for each in (batches, other)
    )
    return float((one - two).abs().sum(dim=1).mean() / 2)
