"""Detects shifts of the data while a run trains: by experts, loss, token ids, data sources."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from moepp_megatron.config import Config
from moepp_megatron.config.errors import ConfigError
from moepp_megatron.data.document_sources import source_names
from moepp_megatron.observe.expert_usage import ExpertUsage
from moepp_megatron.observe.shift import ShiftMonitor
from moepp_megatron.observe.shift_reading import ShiftFinding, ShiftReading
from moepp_megatron.observe.source_shift import SourceShift
from moepp_megatron.observe.token_shift import TokenShift
from moepp_megatron.observe.usage_file import StoredUsage
from moepp_megatron.training.expert_usage import (
    FREQUENCY_CLASSES,
    ExpertUsageCollector,
    token_classes,
)
from moepp_megatron.training.parts.batch_losses import BatchLoss
from moepp_megatron.training.parts.routing_counts import RoutingCounts
from moepp_megatron.training.setup import TrainingModel
from moepp_megatron.training.shift_text import (
    ShiftStory,
    moved_classes,
    moved_experts,
    with_sources,
    with_tokens,
)
from moepp_megatron.training.token_counts import TokenCounts

logger = logging.getLogger(__name__)

# Data sources that an alert names.
_MOST_SOURCES = 3


class RoutingShift:
    """Profile, reference and judgement of a run. Every rank has one and calls it together.

    Args:
        config: The run's configuration; `routing_guard.shift.window` is above 0.
        model: The wrapped model.
        routing: Resets what the layers count at the beginning of each step.
        dataset: The training set, for the frequency of tokens and the names of data sources.
        state: `state_dict` of a checkpoint; None at the beginning.

    Attributes:
        counts: Counts the token ids of a step, if it is told its batches.

    Raises:
        ConfigError: `routing_guard.shift.reference` is not there, damaged, or of another model.
    """

    def __init__(
        self,
        config: Config,
        model: TrainingModel,
        routing: RoutingCounts,
        dataset: Any,
        state: dict[str, Any] | None = None,
    ) -> None:
        settings = config.routing_guard.shift
        self._folder, self._routing, self._names = Path(config.run.dir), routing, config.moe.names
        # The newest whole windows without a shift, and the one that has ended with this step.
        self._span = settings.span
        self._windows: list[ExpertUsage] = []
        self._ended: ExpertUsage | None = None
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
        names = source_names(dataset) if config.observe.token_groups else ()
        self._sources = SourceShift(settings, names) if len(names) > 1 else None
        self.counts, self._tokens = TokenCounts(config.model.vocab_size), TokenShift(settings)
        if stored is None:
            self._monitor = ShiftMonitor(settings)
        else:
            _check_shapes(stored, self._collector, str(settings.reference))
            self._monitor = ShiftMonitor(settings, stored.usage.experts, stored.noise)
        if state is None:
            return
        # Token ids are the same whatever the model's layers are.
        if "tokens" in state:
            self._tokens.load_state_dict(state["tokens"])
        if self._sources is not None and "sources" in state:
            self._sources.load_state_dict(state["sources"])
        if "windows" not in state:
            logger.warning("detector of the checkpoint is that of an older version: begun anew")
        elif (state["shapes"], state["token_classes"]) == (self._shapes(), self._classes):
            self._collector.load_state_dict(state["window"])
            self._windows = [ExpertUsage.from_json(values) for values in state["windows"]]
            self._monitor.load_state_dict(state["monitor"])
        else:
            # Another implementation or schedule, whose layers are told other things of their
            # tokens, or another run's profile to compare with.
            logger.warning("routing profile of the checkpoint has other cells: begun anew")

    def end_step(
        self, loss: BatchLoss, sources: NDArray[np.float64] | None = None
    ) -> ShiftReading | None:
        """Judge the batch just taken; a collective.

        Args:
            loss: Its losses, to the same bits on every rank.
            sources: [sources, 2] sum of token losses and tokens of each data source, likewise; None
                where they are not known.

        Returns:
            None until there is enough to compare with.
        """
        # Counts, so their sums are the same on every rank.
        experts = self._routing.selections().numpy().astype(np.int64)
        reading = self._monitor.add(experts, loss.mean, loss.spread)
        further = {"tokens": self._tokens.add(self.counts.end())}
        if self._sources is not None and sources is not None:
            further["source"] = self._sources.add(sources)
        known: dict[str, Any] = {k: value for k, value in further.items() if not math.isnan(value)}
        if known:
            reading = replace(reading or ShiftReading(math.nan, math.nan, "data"), **known)
        if reading is not None and self._tokens.over_limit > 1.0:
            reading = replace(reading, cause="data")
        self._ended = self._collector.end_step()
        if self._ended is not None and (reading is None or not reading.is_shift):
            self._windows = [*self._windows, self._ended][-self._span :]
        return reading

    def explain(self) -> ShiftStory | None:
        """What the newest reading is about; None where nothing is suspect; a collective."""
        finding, story = self._monitor.explain(), None
        if finding is not None:
            story = ShiftStory.of(finding, self._moved(finding))
        if self._tokens.over_limit > 1.0:
            story = with_tokens(story, self._tokens.steps, self._tokens.moved)
        if self._sources is not None and (lines := self._sources.moved()):
            story = with_sources(story, self._sources.steps, lines[:_MOST_SOURCES])
        return story

    def _moved(self, finding: ShiftFinding) -> list[str]:
        """The experts and the classes of tokens that have moved most; a collective."""
        moved = moved_experts(finding, self._names, self._routing.layer_numbers)
        before, now = self._windows, self._ended or self._collector.unfinished()
        if now is not None and before and before[-1] is not now:
            moved += moved_classes(before, now, self._routing.layer_numbers)
        return moved

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint, the same on every rank; a collective."""
        state = {
            "token_classes": self._classes,
            "shapes": self._shapes(),
            "window": self._collector.state_dict(),
            "windows": [profile.as_json() for profile in self._windows],
            "monitor": self._monitor.state_dict(),
            "tokens": self._tokens.state_dict(),
        }
        if self._sources is not None:
            state["sources"] = self._sources.state_dict()
        return state

    def write(self) -> None:
        """Write `routing_profile.json` into the run's folder, on rank 0, once there is a window."""
        if dist.get_rank() == 0 and self._windows:
            newest = sum(self._windows[1:], self._windows[0])
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
