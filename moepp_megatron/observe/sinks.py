"""All sinks of a run, and the fan-out that protects training from their failures."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepp_megatron.config.choices import pick
from moepp_megatron.config.schema import WandbSection
from moepp_megatron.experts import ExpertCounts
from moepp_megatron.file_names import METRICS_FILE
from moepp_megatron.observe.console import ConsoleSink
from moepp_megatron.observe.jsonl import JsonlSink
from moepp_megatron.observe.metrics import StepMetrics
from moepp_megatron.observe.sink import RetryingSink, Sink
from moepp_megatron.observe.status import StatusSink
from moepp_megatron.observe.tensorboard import TensorBoardSink
from moepp_megatron.observe.wandb_sink import WandbSink

logger = logging.getLogger(__name__)

__all__ = [
    "ConsoleSink",
    "Sink",
    "SinkSettings",
    "Sinks",
    "TensorBoardSink",
    "WandbRun",
    "open_sinks",
]


class Sinks:
    """Passes each record to every sink; an optional sink that fails is dropped from then on."""

    def __init__(
        self,
        required: Sequence[Sink],
        optional: Sequence[Sink] = (),
        say: Callable[[str], None] = print,
    ) -> None:
        """Take open sinks, to be closed here.

        Args:
            required: Sinks whose failure must stop the run, since the record would be lost.
            optional: Sinks that are a convenience.
        """
        self._required = list(required)
        self._optional = list(optional)
        self.say = say

    def write(self, record: StepMetrics) -> None:
        """Pass the record to every sink, required ones first.

        Raises:
            Exception: Any exception of a required sink.
        """
        self._each_sink(lambda sink: sink.write(record), record.step)

    def go_back(self, step: int) -> None:
        """Tell every sink that the run went back to the state after `step`.

        Raises:
            Exception: Any exception of a required sink.
        """
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
class WandbRun:
    """Arguments with which a run at W&B is opened."""

    settings: WandbSection
    name: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class SinkSettings:
    """Arguments to open sinks.

    Attributes:
        phi: Target of the FFN share, which the console shows.
        resume_step: The first step that will be written; see `JsonlSink`.
        moe_layers: Numbers of the MoE layers in the model, from 1; by default 1, 2, ...
    """

    run_dir: Path
    experts: ExpertCounts
    phi: float
    total_steps: int
    resume_step: int | None = None
    wandb: WandbRun | None = None
    moe_layers: Sequence[int] = ()
    plugins: Sequence[str] = ()


def _tensorboard(run: SinkSettings) -> Sink:
    folder = run.run_dir / "tensorboard"
    return TensorBoardSink(folder, run.experts, run.resume_step, run.moe_layers)


def _wandb(run: SinkSettings) -> Sink | None:
    if run.wandb is None:
        return None
    settings, name, config = run.wandb.settings, run.wandb.name, run.wandb.config
    resumes = run.resume_step is not None and run.resume_step > 1
    return WandbSink(settings, run.run_dir, name, config, run.experts, resumes, run.moe_layers)


# What opens each view of a run, or nothing where it is not wanted.
VIEWS: dict[str, Callable[[SinkSettings], Sink | None]] = {
    "status file": lambda run: StatusSink(run.run_dir),
    "TensorBoard output": _tensorboard,
    "W&B output": _wandb,
}


def open_sinks(run: SinkSettings) -> Sinks:
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
    return Sinks([RetryingSink(jsonl)], optional, console.message)
