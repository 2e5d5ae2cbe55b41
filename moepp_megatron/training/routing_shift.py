"""Detects shifts of the data while a run trains, by how its routers use their experts."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from moepp_megatron.config import Config
from moepp_megatron.config.errors import ConfigError
from moepp_megatron.observe.shift import ShiftMonitor
from moepp_megatron.observe.usage_file import StoredUsage
from moepp_megatron.training.collect import RoutingCollector
from moepp_megatron.training.expert_usage import (
    FREQUENCY_CLASSES,
    ExpertUsageCollector,
    token_classes,
)
from moepp_megatron.training.setup import TrainingModel

logger = logging.getLogger(__name__)


class RoutingShift:
    """Usage, reference and judgement of a run. Every rank has one and calls it together.

    Args:
        config: The run's configuration; `routing_guard.shift.window` is above 0.
        model: The wrapped model.
        routing: Resets what the layers count at the beginning of each step.
        dataset: The training set, for the frequency of tokens.
        state: `state_dict` of a checkpoint; None at the beginning.

    Raises:
        ConfigError: `routing_guard.shift.reference` is not there, damaged, or of another model.
    """

    def __init__(
        self,
        config: Config,
        model: TrainingModel,
        routing: RoutingCollector,
        dataset: Any,
        state: dict[str, Any] | None = None,
    ) -> None:
        settings = config.routing_guard.shift
        self._folder = Path(config.run.dir)
        stored = None if settings.reference is None else _read(settings.reference, config)
        if stored is not None:
            self._classes = stored.token_classes
        elif state is not None:
            # Not from the training set again: a longer run has other samples.
            self._classes = state["token_classes"]
        else:
            classes = token_classes(dataset, config.model.vocab_size)
            self._classes = "".join(map(str, classes.tolist()))
        as_array = np.array([int(digit) for digit in self._classes], dtype=np.int64)
        self._collector = ExpertUsageCollector(config, model, routing, as_array)
        if stored is None:
            self._monitor = ShiftMonitor(settings)
        else:
            _check_shapes(stored, self._collector, str(settings.reference))
            self._monitor = ShiftMonitor(settings, stored.usage, stored.noise)
        if state is None:
            return
        if (state["shapes"], state["token_classes"]) == (self._shapes(), self._classes):
            self._collector.load_state_dict(state["window"])
            self._monitor.load_state_dict(state["monitor"])
        else:
            # Another implementation or schedule, whose layers are told other things of their
            # tokens, or another run's usage to compare with.
            logger.warning("expert usage of the checkpoint has other cells: begun anew")

    def end_step(self) -> float | None:
        """Count the step just taken; a collective where its window ends.

        Returns:
            The metric `routing_shift` where a window ends that is judged, else None.
        """
        usage = self._collector.end_step()
        return None if usage is None else self._monitor.add(usage)

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint, the same on every rank; a collective."""
        return {
            "token_classes": self._classes,
            "shapes": self._shapes(),
            "window": self._collector.state_dict(),
            "monitor": self._monitor.state_dict(),
        }

    def write(self) -> None:
        """Write `routing_profile.json` into the run's folder, on rank 0, once there is a window."""
        newest = self._monitor.newest
        if dist.get_rank() == 0 and newest is not None:
            StoredUsage(newest, self._classes, self._monitor.noise).write(self._folder)

    def _shapes(self) -> list[list[int]]:
        """The shapes as lists, as in JSON."""
        return [list(shape) for shape in self._collector.shapes]


def _read(path: Path, config: Config) -> StoredUsage:
    stored = StoredUsage.read(path, config.routing_guard.shift)
    found, vocab_size = len(stored.token_classes), config.model.vocab_size
    if found != vocab_size or not set(stored.token_classes) <= set("0123"[:FREQUENCY_CLASSES]):
        raise ConfigError(
            f"routing_guard.shift.reference ({path}) has {found} token ids with "
            f"{FREQUENCY_CLASSES} classes, which must be model.vocab_size ({vocab_size}); use one "
            "of a run with the same vocabulary"
        )
    return stored


def _check_shapes(stored: StoredUsage, collector: ExpertUsageCollector, path: str) -> None:
    if stored.usage.shapes != collector.shapes:
        theirs, ours = (
            f"{experts[0]} MoE layers, {experts[1]} experts and {cells[1]} cells"
            for experts, cells in (stored.usage.shapes, collector.shapes)
        )
        raise ConfigError(
            f"routing_guard.shift.reference ({path}) has {theirs}, which must be the model's "
            f"({ours}); use one of a run of this model, with the same schedule"
        )
