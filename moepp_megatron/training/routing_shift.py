"""Detects shifts of the data while a run trains: by experts, loss, token ids, data sources."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from moepp_megatron.config import Config
from moepp_megatron.config.errors import ConfigError
from moepp_megatron.data.document_sources import source_names
from moepp_megatron.observe.expert_usage import ExpertUsage
from moepp_megatron.observe.shift.monitor import ShiftMonitor
from moepp_megatron.observe.shift.reading import (
    ShiftFinding,
    ShiftReading,
    ShiftStory,
    moved_classes,
    moved_experts,
)
from moepp_megatron.observe.shift.tokens import GROUPS, group_of
from moepp_megatron.observe.usage_file import StoredUsage
from moepp_megatron.training.expert_usage import (
    FREQUENCY_CLASSES,
    ExpertUsageCollector,
    token_classes,
)
from moepp_megatron.training.parts.batch_losses import BatchLoss
from moepp_megatron.training.parts.routing_counts import RoutingCounts
from moepp_megatron.training.setup import TrainingModel
from moepp_megatron.training.step import Batch
from moepp_megatron.training.step_sums import first_of_tensor_ranks, shared_sum

logger = logging.getLogger(__name__)


class RoutingShift:
    """Usage of the experts, reference and judgement of a run. Every rank calls it together.

    Args:
        config: The run's configuration; `routing_guard.shift.window` is above 0.
        model: The wrapped model.
        routing: Resets what the layers count at the beginning of each step.
        dataset: The training set, for the frequency of tokens and the names of data sources.
        state: `state_dict` of a checkpoint; None at the beginning.

    Attributes:
        counts: Counts the token ids of a step, if it is given its batches.

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
        self.counts = TokenCounts(config.model.vocab_size)
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
        if stored is None:
            self._monitor = ShiftMonitor(settings, names)
        else:
            _check_shapes(stored, self._collector, str(settings.reference))
            self._monitor = ShiftMonitor(settings, names, stored.usage.experts, stored.noise)
        if state is not None:
            self._load(state)

    def _load(self, state: dict[str, Any]) -> None:
        if "windows" not in state:
            logger.warning("detector of the checkpoint is that of an older version: begun anew")
        elif (state["shapes"], state["token_classes"]) != (self._shapes(), self._classes):
            # Another implementation or schedule, whose layers know other things of their tokens, or
            # another run's profile to compare with.
            logger.warning("routing profile of the checkpoint has other cells: begun anew")
        else:
            self._collector.load_state_dict(state["window"])
            self._windows = [ExpertUsage.from_json(values) for values in state["windows"]]
            self._monitor.load_state_dict(state)
            return
        # Token ids and losses are the same whatever the model's layers are.
        self._monitor.load_state_dict({k: v for k, v in state.items() if k != "monitor"})

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
        tokens = self.counts.end()
        reading = self._monitor.add(experts, loss.mean, loss.spread, tokens, sources)
        self._ended = self._collector.end_step()
        if self._ended is not None and (reading is None or not reading.is_shift):
            self._windows = [*self._windows, self._ended][-self._span :]
        return reading

    def explain(self) -> ShiftStory | None:
        """What the newest reading is about; None where nothing is suspect; a collective."""
        return self._monitor.explain(self._moved)

    def _moved(self, finding: ShiftFinding) -> list[str]:
        """The experts and the classes of tokens that have moved most; a collective."""
        moved = moved_experts(finding, self._names, self._routing.layer_numbers)
        before, now = self._windows, self._ended or self._collector.unfinished()
        if now is not None and before and before[-1] is not now:
            moved += moved_classes(before, now, self._routing.layer_numbers)
        return moved

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint, the same on every rank; a collective."""
        return {
            "token_classes": self._classes,
            "shapes": self._shapes(),
            "window": self._collector.state_dict(),
            "windows": [usage.as_json() for usage in self._windows],
            **self._monitor.state_dict(),
        }

    def write(self) -> None:
        """Write `routing_profile.json` into the run's folder, on rank 0, once there is a window."""
        if dist.get_rank() == 0 and self._windows:
            newest = sum(self._windows[1:], self._windows[0])
            StoredUsage(newest, self._classes, self._monitor.noise).write(self._folder)

    def _shapes(self) -> list[list[int]]:
        """The shapes as lists, as in JSON."""
        return [list(shape) for shape in self._collector.shapes]


class TokenCounts:
    """Counts a batch's labels that have a loss, on the device, by group of ids; a `Summand`.

    Three kernels a micro-batch, and one a step.
    """

    def __init__(self, vocab_size: int) -> None:
        device = torch.cuda.current_device()
        self._group_of = torch.from_numpy(group_of(np.arange(vocab_size))).to(device)
        self._counts = torch.zeros(GROUPS, dtype=torch.float64, device=device)
        self._total: Tensor | None = None

    def begin(self) -> None:
        """Begin a new batch."""
        self._counts.zero_()
        self._total = None

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Add a micro-batch's `labels` [b, s] where `loss_mask` is not 0, on the last stage."""
        if first_of_tensor_ranks():
            groups = self._group_of[batch["labels"].reshape(-1)]
            self._counts.index_add_(0, groups, batch["loss_mask"].reshape(-1).double())

    def summand(self) -> Tensor:
        """[GROUPS] float64 on the device: this rank's counts."""
        return self._counts

    def take_sum(self, total: Tensor) -> None:
        """Note the counts [GROUPS] over all ranks."""
        self._total = total

    def end(self) -> NDArray[np.float64]:
        """[GROUPS] counts over all ranks; a collective unless the step has summed them."""
        if self._total is None:
            self._total = shared_sum(self.summand().clone()).cpu()
        return self._total.numpy()


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
