"""The expert usage of a running training, from what the routers of all ranks count."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist

from moepp_megatron.config import Config
from moepp_megatron.data.token_frequency import frequency_classes, token_counts
from moepp_megatron.moe.layer import moe_statistics
from moepp_megatron.observe.expert_usage import ExpertUsage
from moepp_megatron.training.parts.routing_counts import RoutingCounts
from moepp_megatron.training.setup import TrainingModel
from moepp_megatron.training.tagging import layers_know_tokens, tags_of

_POSITION_BINS = 4
FREQUENCY_CLASSES = 4


class ExpertUsageCollector:
    """Adds up the usage of windows of steps. Every rank has one and calls its methods together.

    Its construction makes the model's layers count cells, if they know their tokens. A
    window costs one all-reduce of its counts; a step adds on the device without
    synchronising.

    Args:
        config: The run's configuration; `routing_guard.shift.window` is above 0.
        model: The wrapped model.
        routing: Resets what the layers count at the beginning of each step.
        token_classes: [vocabulary] int64, from `token_classes` or of the run to compare with.
    """

    def __init__(
        self,
        config: Config,
        model: TrainingModel,
        routing: RoutingCounts,
        token_classes: np.ndarray,
    ) -> None:
        self._window = config.routing_guard.shift.window
        self._num_experts = config.moe.num_experts
        self._numbers = list(routing.layer_numbers)
        self._statistics = {
            number: statistics
            for chunk in model.models
            for number, statistics in moe_statistics(chunk).items()
        }
        self._num_cells = 0
        if layers_know_tokens(config):
            self._num_cells = _tag_tokens(model, config, token_classes)
            for statistics in self._statistics.values():
                statistics.num_cells = self._num_cells
        self._begin()

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the usage's `experts` and `cells`."""
        layers = len(self._numbers)
        return (layers, self._num_experts), (layers, self._num_cells, 2)

    def end_step(self) -> ExpertUsage | None:
        """Count the step just taken, which `routing` has not reset yet.

        Returns:
            The window's usage over all ranks, the same on each, where the window ends; a
            collective there, and nowhere else.
        """
        for row, number in enumerate(self._numbers):
            statistics = self._statistics.get(number)
            if statistics is None:
                continue
            counts = statistics.selected if statistics.wanted is None else statistics.wanted
            if counts is not None:
                self._counts[row, : self._num_experts] += counts
            if statistics.cells is not None:
                self._counts[row, self._num_experts :] += statistics.cells.flatten()
        self._steps += 1
        if self._steps < self._window:
            return None
        total = self._reduced()
        self._begin()
        return self._usage(total)

    def unfinished(self) -> ExpertUsage | None:
        """The profile of the window so far, over all ranks; None before a step; a collective."""
        return None if self._steps == 0 else self._usage(self._reduced())

    def state_dict(self) -> dict[str, Any]:
        """The counts of the unfinished window, over all ranks, as JSON; a collective."""
        usage = self.unfinished()
        return {"steps": self._steps, "profile": None if usage is None else usage.as_json()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`, in any layout.

        Raises:
            ValueError: If it holds no valid usage, or one of another model.
        """
        self._begin()
        if state["profile"] is None:
            return
        usage = ExpertUsage.from_json(state["profile"])
        if usage.shapes != self.shapes:
            raise ValueError(f"its usage has the shapes {usage.shapes}, not {self.shapes}")
        self._steps = state["steps"]
        # Counts that are all there already belong to one rank.
        if dist.get_rank() == 0:
            cells = usage.cells.reshape(len(self._numbers), -1)
            both = np.concatenate([usage.experts, cells], axis=1)
            self._counts += torch.from_numpy(both).to(self._counts.device)

    def _begin(self) -> None:
        width = self._num_experts + 2 * self._num_cells
        self._steps = 0
        self._counts = torch.zeros(
            len(self._numbers), width, dtype=torch.int64, device=torch.cuda.current_device()
        )

    def _reduced(self) -> np.ndarray:
        """[L, E + 2 C] int64 over all ranks."""
        # Each router counts its rank's tokens, which differ between replicas, parts of the sequence
        # and layers. Expert parallelism does not matter: it counts before tokens are sent.
        total = self._counts.clone()
        dist.all_reduce(total)
        return total.cpu().numpy()

    def _usage(self, total: np.ndarray) -> ExpertUsage:
        experts, cells = np.split(total, [self._num_experts], axis=1)
        return ExpertUsage(experts, cells.reshape(len(self._numbers), self._num_cells, 2))


def token_classes(dataset: Any, vocab_size: int) -> np.ndarray:
    """[V] int64 class of each token id by its frequency in the training set, on every rank.

    Every rank must call.
    """
    return frequency_classes(counts_on_ranks(dataset, vocab_size), FREQUENCY_CLASSES)


# Counts by training set, which two instruments ask for.
_COUNTED: WeakKeyDictionary[Any, np.ndarray] = WeakKeyDictionary()


def counts_on_ranks(dataset: Any, vocab_size: int) -> np.ndarray:
    """[V] int64 `token_counts` of the training set: rank 0 reads, and every rank must call.

    It is read once.
    """
    known = _COUNTED.get(dataset)
    if known is not None and len(known) == vocab_size:
        return known
    counts = torch.zeros(vocab_size, dtype=torch.int64, device=torch.cuda.current_device())
    if dist.get_rank() == 0:
        counts.copy_(torch.from_numpy(token_counts(dataset, vocab_size)))
    dist.broadcast(counts, 0)
    _COUNTED[dataset] = counts.cpu().numpy()
    return _COUNTED[dataset]


def _tag_tokens(model: TrainingModel, config: Config, classes: np.ndarray) -> int:
    """Make every chunk pass its layers the cells of their tokens; the number of cells."""
    on_device = torch.from_numpy(classes).to(torch.cuda.current_device())
    for chunk in model.models:
        tags = tags_of(chunk, config)
        tags.position_bins, tags.frequency_bins = _POSITION_BINS, FREQUENCY_CLASSES
        tags.classes = on_device
    return _POSITION_BINS * FREQUENCY_CLASSES
