"""Callbacks: a user's objects that get the events of a run, called as parts are."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moepp_megatron.config import Config, ConfigError
from moepp_megatron.config.plugins import PREFIX, load_plugin
from moepp_megatron.observe.metrics import StepMetrics
from moepp_megatron.training.checkpoint.files import Progress
from moepp_megatron.training.part import Part, PartContext, Step
from moepp_megatron.training.resilience.supervisor import Supervisor
from moepp_megatron.training.setup import TrainingModel
from moepp_megatron.training.signals import StopRequest
from moepp_megatron.training.step import unchanged

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunState:
    """The run's state for a callback, after `step` optimizer steps and `tokens` tokens.

    `models` are this rank's model chunks, to look at. `stop` asks the run to save and end, as
    Ctrl-C does: one rank is enough, and every rank ends after the same step, this one or the next.
    """

    rank: int
    world_size: int
    step: int
    tokens: int
    config: Config
    folder: Path
    models: Sequence[torch.nn.Module]
    stop: Callable[[], None]


class Callback:
    """Base class of callbacks; a method that is not overridden does nothing.

    Its methods are those of the same names of a part (`training.part.Part`), with the run's state
    first. Every rank has its own object of each callback, and calls its methods at the same moments
    of the run in the same order. What a method draws from the random number generators, or changes
    in the model's buffers, is put back when it returns. An exception ends the run
    (`CallbackError`).

    A method must do the same collectives on every rank, and none in `failed`. It must not change
    parameters.
    """

    def begin(self, run: RunState) -> None:
        """The first step of this start comes next; `run.step` is above 0 after a resume."""

    def after_step(self, run: RunState, record: StepMetrics | None) -> None:
        """A step has been taken and judged.

        Not called for a batch that was refused, or a step that was undone by a rollback.

        Args:
            run: The run's state after the step.
            record: The record of a logged step, global and the same on every rank; None for others.
                Steps after which the model is evaluated are logged, with `valid_loss` and
                `task_score`.
        """

    def saved(self, run: RunState, checkpoint: Path) -> None:
        """A checkpoint is complete on disk.

        With `checkpoint.async_save` that is some steps after its own, which is in its name.
        """

    def failed(self, run: RunState, error: Exception) -> None:
        """An exception ends the run on this rank; other ranks may be waiting in a collective.

        An exception of this method is logged and changes nothing.
        """

    def end(self, run: RunState) -> None:
        """The run ends as it should, or because it was asked to stop; its checkpoint is written."""


# Methods that earlier versions called.
_RENAMED = {
    "on_start": "begin",
    "on_step": "after_step",
    "on_evaluation": "after_step, whose record has valid_loss and task_score",
    "on_save": "saved",
    "on_exception": "failed",
    "on_end": "end",
}


class CallbackError(RuntimeError):
    """A callback has raised an exception, which is the cause of this one."""


class CallbacksPart(Part):
    """The callbacks of a run: those `given`, then those of `run.callbacks`, which are made here.

    The supervisor is notified of callbacks at work, so that a report of a hang names them.

    Raises:
        ConfigError: A plugin cannot be imported, or one is no `Callback`.
        CallbackError: One cannot be made.
    """

    def __init__(
        self,
        config: Config,
        model: TrainingModel,
        supervisor: Supervisor,
        given: Sequence[object] = (),
    ) -> None:
        self._config, self._model, self._supervisor = config, model, supervisor
        self._named: list[tuple[str, Any]] = [
            (type(callback).__name__, callback) for callback in given
        ]
        for name in config.run.callbacks:
            make, bare = load_plugin("callbacks", "run.callbacks", name), name.removeprefix(PREFIX)
            with unchanged(model), _failing_as(f"callback {bare} could not be made"):
                self._named.append((bare, make()))
        for name, callback in self._named:
            _check(name, callback)

    @classmethod
    def of(cls, run: PartContext) -> "CallbacksPart":
        """The part of a run, which may have none but plugins' callbacks."""
        return cls(run.config, run.model, run.supervisor, run.callbacks)

    def begin(self, progress: Callable[[], Progress], stop: StopRequest) -> None:
        """Call `begin`; `RunState.stop` asks `stop`."""
        self._progress, self._stop = progress, stop
        self._call("begin")

    def after_step(self, step: Step, record: StepMetrics | None) -> None:
        """Call `after_step`."""
        self._call("after_step", record)

    def saved(self, checkpoint: Path) -> None:
        """Call `saved`."""
        self._call("saved", checkpoint)

    def end(self) -> None:
        """Call `end`."""
        self._call("end")

    def failed(self, error: Exception) -> None:
        """Call `failed`, whose own exceptions are logged."""
        for name, callback in self._named:
            try:
                callback.failed(self._state(), error)
            except (Exception, SystemExit):
                logger.exception("callback %s failed in failed", name)

    def _call(self, method: str, *arguments: Any) -> None:
        """Call a method of every callback; `CallbackError` if one raises."""
        for name, callback in self._named:
            what = f"callback {name} failed in {method} after step {self._progress().step}"
            with (
                _failing_as(what),
                unchanged(self._model),
                self._supervisor.during(f"callback {name}"),
            ):
                getattr(callback, method)(self._state(), *arguments)

    def _state(self) -> RunState:
        progress = self._progress()
        return RunState(
            dist.get_rank(),
            dist.get_world_size(),
            progress.step,
            progress.tokens,
            self._config,
            Path(self._config.run.dir),
            self._model.models,
            self._stop.ask,
        )


def _check(name: str, callback: object) -> None:
    """Refuse what is no callback, and methods that earlier versions called."""
    if not isinstance(callback, Callback):
        raise ConfigError(
            f"callback {name} ({type(callback).__name__}) must be a Callback; give an object of a "
            "class derived from moepp_megatron.Callback, or such a class as the entry point"
        )
    for method, new in _RENAMED.items():
        if hasattr(callback, method):
            raise ConfigError(
                f"callback {name} ({type(callback).__name__}) must have no method {method}, which "
                f"nothing calls any more; use {new}"
            )


@contextmanager
def _failing_as(what: str) -> Iterator[None]:
    """Re-raise what a callback raises as `CallbackError`, `SystemExit` too."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise CallbackError(f"{what}: {type(error).__name__}: {error}") from error
