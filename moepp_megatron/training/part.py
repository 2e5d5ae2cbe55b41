"""The protocol of a part, and the list of parts that the trainer runs.

A part is one feature of a run: it counts, judges, changes or records something in each step. The
trainer knows parts by this protocol only. Every rank has the same parts in the same order and calls
their methods together, so a method may be a collective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from moepp_megatron.config import Config, ConfigError, Layout
from moepp_megatron.observe.alerts import Alert
from moepp_megatron.observe.metrics import StepMetrics
from moepp_megatron.training.checkpoint.files import Progress
from moepp_megatron.training.resilience.supervisor import Supervisor
from moepp_megatron.training.setup import TrainingModel
from moepp_megatron.training.signals import StopRequest
from moepp_megatron.training.step import StepHooks, StepResult


@dataclass(frozen=True)
class Step:
    """A step that has been taken, or a batch that was refused; `progress` is from after it.

    Attributes:
        first_sample: Where in the data its batch begins.
        samples: Sequences of its batch, over all ranks.
        started: `time.perf_counter` at its beginning.
    """

    progress: Progress
    first_sample: int
    samples: int
    started: float
    result: StepResult

    @property
    def number(self) -> int:
        """Optimizer steps done."""
        return self.progress.step

    @property
    def attempt(self) -> int:
        """Number of the step that was taken, or that its refused batch was for."""
        return self.number if self.updated else self.number + 1

    @property
    def updated(self) -> bool:
        """True if the optimizer has changed the parameters."""
        return self.result.updated

    @property
    def is_finite(self) -> bool:
        """True if the loss is finite over all ranks."""
        return self.result.is_finite


@dataclass(frozen=True)
class Rollback:
    """A part wants the run to go back to its newest checkpoint, up to `up_to_step` if not None.

    `alerts_before` gets that checkpoint before it is loaded, or None where there is none and
    nothing else happens; `alerts_after` gets it when it has been loaded.
    """

    up_to_step: int | None
    alerts_before: Callable[[Path | None], Sequence[Alert]]
    alerts_after: Callable[[Path], Sequence[Alert]] = lambda _: ()


@dataclass(frozen=True)
class Pause:
    """A part wants the run to save and end, to be resumed by the user."""

    reason: str


@dataclass(frozen=True)
class Stop:
    """A part wants the run to save and fail with `error`, given the outcome of the save."""

    error: Callable[[str], Exception]


Outcome = Alert | Rollback | Pause | Stop

State = Mapping[str, Any]
Fields = Mapping[str, Any]
"""Fields of the record of a logged step, by name."""
Why = Literal["resume", "rollback"]
"""Why a state is loaded: a run begins or is resumed, or goes back to an earlier checkpoint."""


class Part(StepHooks):
    """Base class of parts; a method that is not overridden does nothing.

    A part is also hooks of a step: it may look at micro-batches, add to the loss, join the read of
    the step or refuse its batch. `key` names it for other parts, and its state in a checkpoint; a
    part with a state has a key of its own.
    """

    key: ClassVar[str] = ""

    @classmethod
    def of(cls, run: PartContext) -> Part | None:
        """Make the part of a run; None if it is disabled. Every rank calls."""
        return cls(run) if cls.is_wanted(run) else None  # type: ignore[call-arg]

    @staticmethod
    def is_wanted(run: PartContext) -> bool:
        """True if a run has the part, which is then made of the run."""
        return True

    def begin(self, progress: Callable[[], Progress], stop: StopRequest) -> None:
        """The training loop begins; `progress()` returns the run's current progress."""

    def new_data(self, first_sample: int) -> str | None:
        """Why the next batch comes from a new data stage, or None."""

    def begin_step(self, step: int, layout: Layout) -> None:
        """Training step `step` begins, with the layout's number of micro-batches.

        Called once more where its passes run again (`StepHooks.repeats`).
        """

    def end_step(self, step: Step) -> Iterable[Alert]:
        """Learn from a step, or from a refused batch."""
        return ()

    def wants_record(self, step: int) -> bool:
        """True if `step` must be logged."""
        return False

    def record(self, step: Step, fields: Fields) -> Fields:
        """Fields for the record of a logged step; `fields` has those of the parts before."""
        return {}

    def judge(self, step: Step) -> Iterable[Outcome]:
        """Decide what follows from a step, or a refused batch, after its record is written."""
        return ()

    def after_step(self, step: Step, record: StepMetrics | None) -> None:
        """A step was taken and judged, and is not undone; with its record if it is logged."""

    def state(self) -> State:
        """The part's state for a checkpoint, the same on every rank; later steps do not change it.

        Numbers, text, tensors, and lists and dictionaries of them; empty for none.
        """
        return {}

    def load(self, state: State, why: Why, step: int) -> Iterable[Alert]:
        """Continue from a state; called once before the first step, and after each rollback.

        `state` is the result of an earlier `state`, empty where no checkpoint has one; `step` is
        the run's newest step, of a rollback the last one undone.
        """
        return ()

    def reset_baseline(self, step: int) -> Iterable[Alert]:
        """New data follow `step`, as planned: forget the baseline."""
        return ()

    def write(self) -> None:
        """Write the part's own files into the run's folder, at each save and at the end."""

    def saved(self, checkpoint: Path) -> None:
        """A checkpoint is complete on disk."""

    def end(self) -> None:
        """The training loop has ended normally; its last checkpoint is written."""

    def failed(self, error: Exception) -> None:
        """An exception has ended the loop on this rank; no collectives."""

    def close(self) -> None:
        """Release what the part holds, whatever happened."""


@dataclass(kw_only=True)
class PartContext:
    """The inputs of a part.

    Attributes:
        layout: The rank grid; process groups exist.
        model: The wrapped model, as a checkpoint has left it.
        supervisor: Gets what a rank does, so that a report of a hang names it.
        tokenizer: The tokenizer's file.
        valid_set: The validation part of the data that is trained on; None without one.
        valid_sets: The sets of `data.validation` by name.
        progress: Where the run continues.
        callbacks: A user's, before those that `run.callbacks` names.
        parts: The parts made so far, in order.
    """

    config: Config
    layout: Layout
    model: TrainingModel
    supervisor: Supervisor
    tokenizer: Path
    train_set: Any
    valid_set: Any | None
    valid_sets: Mapping[str, Any]
    progress: Progress
    callbacks: Sequence[object] = ()
    parts: list[Part] = field(default_factory=list)

    def feature(self, key: str) -> Any | None:
        """The part of a feature that comes before; None if this run has none, or it is deleted."""
        return next((part for part in self.parts if part.key == key), None)

    def require[P: Part](self, kind: type[P]) -> P:
        """The part of a kind that comes before and is always there."""
        found = [part for part in self.parts if isinstance(part, kind)]
        assert found, f"{kind.__name__} must come before"
        return found[0]

    def is_due(self, step: int, interval: int, at_end: bool = False) -> bool:
        """True if `step` ends an interval or, for an interval above 0 or `at_end`, the run."""
        if step == self.config.training.train_iters:
            return at_end or interval > 0
        return interval > 0 and step % interval == 0


class Parts(tuple[Part, ...]):
    """The parts of a run, in order; ConfigError if two have one key, or a state has no key."""

    def __new__(cls, parts: Iterable[Part]) -> Parts:
        """Check that states can be told apart."""
        self = super().__new__(cls, parts)
        owners: dict[str, str] = {}
        for part in self:
            name = type(part).__name__
            if not part.key and _has_state(part):
                raise ConfigError(f"part {name} must have a key, since it has a state; give it one")
            if part.key in owners:
                raise ConfigError(
                    f"key ({part.key}) of part {name} must be its own, and is that of "
                    f"{owners[part.key]}; give it another one"
                )
            if part.key:
                owners[part.key] = name
        return self

    @contextmanager
    def running(self, progress: Callable[[], Progress], stop: StopRequest) -> Iterator[None]:
        """Begin, end and close all parts around the loop."""
        try:
            for part in self:
                part.begin(progress, stop)
            yield
            for part in self:
                part.end()
        except Exception as error:
            for part in self:
                part.failed(error)
            raise
        finally:
            for part in reversed(self):
                part.close()

    def begin_step(self, step: int, layout: Layout) -> None:
        """Training step `step` begins."""
        for part in self:
            part.begin_step(step, layout)

    def end_step(self, step: Step) -> list[Alert]:
        """Let all learn from a step."""
        return [alert for part in self for alert in part.end_step(step)]

    def record(self, step: Step, fields: Fields) -> dict[str, Any]:
        """The fields of a record, those of `fields` first."""
        record = dict(fields)
        for part in self:
            record |= part.record(step, record)
        return record

    def state(self) -> dict[str, State]:
        """The states for a checkpoint by the parts' keys."""
        return {part.key: part.state() for part in self if _has_state(part)}

    def load(self, states: Mapping[str, State], why: Why, step: int) -> list[Alert]:
        """Let each part continue from its own of the states, as `Part.load`."""
        return [alert for part in self for alert in part.load(states.get(part.key, {}), why, step)]


def _has_state(part: Part) -> bool:
    return type(part).state is not Part.state
