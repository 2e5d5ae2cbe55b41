"""All sinks of a run, and the fan-out that protects training from their failures."""

import functools
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from moepp_megatron.config.choices import pick
from moepp_megatron.config.schema import WandbSection
from moepp_megatron.experts import ExpertCounts
from moepp_megatron.file_names import METRICS_FILE
from moepp_megatron.observe.console import ConsoleSink
from moepp_megatron.observe.jsonl import JsonlSink
from moepp_megatron.observe.metrics import StepMetrics
from moepp_megatron.observe.status import StatusSink
from moepp_megatron.observe.tensorboard import TensorBoardSink
from moepp_megatron.observe.wandb_sink import WandbSink

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Receives the record of every logged step. One rank of a run owns the sinks."""

    def write(self, record: StepMetrics) -> None:
        """Receive one record."""

    def go_back(self, step: int) -> None:
        """Note that the run went back to the state after `step`: later records do not count."""

    def close(self) -> None:
        """End the sink; nothing is written after it."""


class _RetryingSink:
    """Passes records to a sink in order; those that it refused by OSError wait for the disk."""

    # A full disk must not end a training run that could continue; at the end of the run it must
    # not pass unnoticed either.

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._waiting: deque[Callable[[], None]] = deque()

    def write(self, record: StepMetrics) -> None:
        """Write one record; prints a message each time that records have to wait."""
        self._take(functools.partial(self._sink.write, record), record.step)

    def go_back(self, step: int) -> None:
        """Note that the run went back; waiting records are written before that."""
        self._take(functools.partial(self._sink.go_back, step), step)

    def close(self) -> None:
        """Write waiting records and close the sink; raise OSError if they are lost."""
        try:
            self._write_waiting()
        finally:
            self._sink.close()

    def _take(self, entry: Callable[[], None], step: int) -> None:
        self._waiting.append(entry)
        try:
            self._write_waiting()
        except OSError as error:
            logger.error(
                "step %d: %d records of metrics wait for the disk: %s",
                step,
                len(self._waiting),
                error,
            )

    def _write_waiting(self) -> None:
        while self._waiting:
            self._waiting[0]()
            self._waiting.popleft()


class Sinks:
    """Passes each record to every sink; an optional sink that fails is dropped from then on."""

    def __init__(
        self,
        required: Sequence[Sink],
        optional: Sequence[Sink] = (),
        say: Callable[[str], None] = print,
    ) -> None:
        """Take open sinks, to be closed here; a required one that fails must stop the run."""
        self._required = list(required)
        self._optional = list(optional)
        self.say = say

    @classmethod
    def open(cls, run: "SinkSettings") -> "Sinks":
        """The sinks of a training run: `metrics.jsonl`, the console, `VIEWS` and plugins."""
        jsonl = JsonlSink(run.run_dir / METRICS_FILE, run.resume_step)
        console = ConsoleSink(run.total_steps, phi=run.phi)
        optional: list[Sink] = [console]
        for name in (*VIEWS, *run.plugins):
            try:
                sink = pick(VIEWS, "observe.sinks", name, "sinks")(run)
            except Exception as error:  # a view must not keep a run from starting
                logger.warning("no %s: %s", name, error)
                continue
            if sink is not None:
                optional.append(sink)
        return cls([_RetryingSink(jsonl)], optional, console.message)

    def write(self, record: StepMetrics) -> None:
        """Pass the record to every sink, required ones first; an exception of those is raised."""
        self._each_sink(lambda sink: sink.write(record), record.step)

    def go_back(self, step: int) -> None:
        """Tell every sink that the run went back to the state after `step`; raises like `write`."""
        self._each_sink(lambda sink: sink.go_back(step), step)

    def _each_sink(self, act: Callable[[Sink], None], step: int) -> None:
        for sink in self._required:
            act(sink)
        for sink in list(self._optional):
            try:
                act(sink)
            except Exception as error:  # a view must not end a training run
                self._optional.remove(sink)
                logger.warning(
                    "%s failed at step %d and is off from here on: %s",
                    type(sink).__name__,
                    step,
                    error,
                )

    def close(self) -> None:
        """Close every sink, whatever the others do; a required sink's error is raised last."""
        failure: Exception | None = None
        for sink in [*self._optional, *self._required]:
            try:
                sink.close()
            except Exception as error:  # the other sinks must be closed too
                if sink in self._required:
                    failure = error
                else:
                    logger.warning("%s could not be closed: %s", type(sink).__name__, error)
        if failure is not None:
            raise failure


@dataclass(frozen=True)
class SinkSettings:
    """Arguments to open sinks.

    The console shows `phi`, the target of the FFN share; `name` and `config` are for W&B.
    `resume_step` is that of `JsonlSink`, and `moe_layers` that of `numbers`.
    """

    run_dir: Path
    experts: ExpertCounts
    phi: float
    total_steps: int
    resume_step: int | None = None
    wandb: WandbSection = WandbSection()
    name: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    moe_layers: Sequence[int] = ()
    plugins: Sequence[str] = ()


def _wandb(run: SinkSettings) -> Sink | None:
    if run.wandb.project is None:
        return None
    resumes = run.resume_step is not None and run.resume_step > 1
    return WandbSink(
        run.wandb, run.run_dir, run.name, run.config, run.experts, resumes, run.moe_layers
    )


# What opens each view of a run, or nothing where it is not wanted.
VIEWS: dict[str, Callable[[SinkSettings], Sink | None]] = {
    "status file": lambda run: StatusSink(run.run_dir),
    "TensorBoard output": lambda run: TensorBoardSink(
        run.run_dir / "tensorboard", run.experts, run.resume_step, run.moe_layers
    ),
    "W&B output": _wandb,
}
