"""Measurement and control of a run's routers, as one object for the training loop."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor

from moepp_megatron.config import Config, Layout
from moepp_megatron.config.guard_rules import is_watched
from moepp_megatron.observe.alerts import Alert
from moepp_megatron.observe.shift_reading import ShiftReading
from moepp_megatron.training.batch_losses import BatchLoss, BatchLosses
from moepp_megatron.training.budget import BudgetControl
from moepp_megatron.training.collect import RoutingCollector
from moepp_megatron.training.data_sources import SourceCollector
from moepp_megatron.training.guard.control import NOTHING, GuardVerdict, RoutingGuard
from moepp_megatron.training.router_health import HealthCollector
from moepp_megatron.training.routing_shift import RoutingShift
from moepp_megatron.training.setup import TrainingModel
from moepp_megatron.training.step import Batch, StepResult
from moepp_megatron.training.step_sums import Summand
from moepp_megatron.training.token_groups import GroupCollector, bands_text, groups_of_run

logger = logging.getLogger(__name__)


class Routers:
    """Every rank has one and calls its methods together; what is switched off is never built.

    Args:
        config: The run's configuration.
        model: The wrapped model, as a checkpoint has left it.
        layout: The rank grid.
        extra: Further state from a checkpoint; empty at the beginning.
        dataset: The training set.
    """

    def __init__(
        self,
        config: Config,
        model: TrainingModel,
        layout: Layout,
        extra: dict[str, Any],
        dataset: Any,
    ) -> None:
        self._config, self._model, self._dataset = config, model, dataset
        self._routing = RoutingCollector(model, config, layout)
        self._health = HealthCollector(
            config, model, self._routing.layer_numbers, config.observe.health_interval
        )
        self._sources = SourceCollector(config, model, dataset)
        groups = groups_of_run(config, dataset, extra.get("token_bands"))
        self._groups: GroupCollector | None = None
        if groups is not None:
            numbers = self._routing.layer_numbers
            self._groups = GroupCollector(config, model, numbers, groups)
        self._budget = self._open_budget(extra)
        self._shift = self._open_shift(extra)
        # Of the newest step; None where none is judged yet.
        self._reading: ShiftReading | None = None
        self._losses = BatchLosses()
        self._loss = BatchLoss(math.nan, math.nan)
        self._guard: RoutingGuard | None = None
        if is_watched(config):
            self._guard = RoutingGuard(
                config, model, self._routing, self._health, self._groups, extra.get("guard")
            )

    def _open_budget(self, extra: dict[str, Any]) -> BudgetControl | None:
        if not self._config.moe.budget.acts:
            return None
        return BudgetControl(self._config, self._model, self._routing, extra.get("budget"))

    def _open_shift(self, extra: dict[str, Any]) -> RoutingShift | None:
        if not is_watched(self._config) or self._config.routing_guard.shift.window == 0:
            return None
        return RoutingShift(
            self._config, self._model, self._routing, self._dataset, extra.get("shift")
        )

    def begin_step(self, step: int, num_microbatches: int) -> None:
        """Training step `step` begins, with so many micro-batches on each rank."""
        self._routing.reset(num_microbatches)
        self._losses.begin()
        self._health.begin_step(step)
        self._begin_counts()
        if self._shift is not None:
            self._shift.counts.begin()
        if self._budget is not None:
            self._budget.begin_step(step)
        if self._guard is not None:
            self._guard.begin_step(step, self._budget)

    def _begin_counts(self) -> None:
        self._sources.begin_step()
        if self._groups is not None:
            self._groups.begin_step()

    def watch_losses(self, chunk: torch.nn.Module, batch: Batch, token_losses: Tensor) -> None:
        """Record a micro-batch's token losses; a `LossWatcher`."""
        self._health.add_losses(chunk, batch, token_losses)
        self._sources.add_losses(batch, token_losses)
        if self._guard is not None:
            self._losses.add(batch, token_losses)
        if self._shift is not None:
            self._shift.counts.add(batch)

    def summands(self) -> list[Summand]:
        """What these objects want summed in the read that every step makes."""
        found: list[Summand] = []
        if self._guard is not None:
            found.append(self._losses)
        if self._shift is not None or self._budget is not None:
            found.append(self._routing)
        if self._shift is not None:
            found.append(self._shift.counts)
        if self._sources.names:
            found.append(self._sources)
        return found

    def reset_counts(self) -> None:
        """Count the selections of a further batch from 0."""
        self._routing.reset()
        self._begin_counts()

    def selections(self) -> Tensor:
        """[MoE layers, E] float64 selections of the batch over all ranks; a collective."""
        return self._routing.selections()

    def learn(self, step: int, result: StepResult) -> list[Alert]:
        """Update the controllers after `step`, and the detector after a refused batch too.

        Returns:
            The controllers' alerts.
        """
        alerts: list[Alert] = []
        if self._budget is not None and result.updated:
            alerts = self._budget.end_step(step)
        if self._guard is not None and result.is_finite:
            self._loss = self._losses.end(result)
            if self._shift is not None:
                sources = self._sources.losses() if self._sources.names else None
                self._reading = self._shift.end_step(self._loss, sources)
        return alerts

    def judge(self, step: int, result: StepResult) -> GuardVerdict:
        """The alerts and actions for `step`, after its record, or for a batch refused after it."""
        if self._guard is None or not result.is_finite:
            return NOTHING
        explain = (lambda: None) if self._shift is None else self._shift.explain
        return self._guard.end_step(step, result, self._loss, self._reading, explain)

    def go_back(self, step: int, extra: dict[str, Any]) -> list[Alert]:
        """Reset the state after a checkpoint has been loaded.

        Args:
            step: The last step that is undone.
            extra: Further state of the checkpoint.

        Returns:
            The alerts.
        """
        self._budget = self._open_budget(extra)
        self._shift, self._reading = self._open_shift(extra), None
        return [] if self._guard is None else self._guard.go_back(step, extra.get("guard"))

    def announce_stage(self, step: int) -> list[Alert]:
        """Begin rules and detector anew, because other data follow after `step`; every rank."""
        self._shift, self._reading = self._open_shift({}), None
        return [] if self._guard is None else self._guard.announce_stage(step)

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, which later steps do not change; a collective."""
        state: dict[str, Any] = {}
        if self._groups is not None:
            state["token_bands"] = bands_text(self._groups.groups)
        if self._budget is not None:
            state["budget"] = self._budget.state()
        if self._guard is not None:
            state["guard"] = self._guard.state()
        if self._shift is not None:
            state["shift"] = self._shift.state_dict()
        return state

    def write_expert_usage(self) -> None:
        """Write the run's `routing_profile.json`, if profiles are made."""
        try:
            if self._shift is not None:
                self._shift.write()
        except OSError as error:
            logger.error("the expert usage could not be written: %s", error)

    def routing_metrics(self) -> dict[str, Any]:
        """Fields for the record from the selections of the step; a collective."""
        fields = self._routing.collect() | self._sources.collect()
        return fields if self._groups is None else fields | self._groups.collect()

    def metrics(self, step: int) -> dict[str, Any]:
        """Further fields for the record of `step`; a collective in a step that is measured."""
        fields: dict[str, Any] = dict(self._health.collect())
        if self._budget is not None:
            fields |= self._budget.metrics(step)
        if self._guard is not None:
            fields |= self._guard.metrics()
        if self._reading is not None:
            fields |= self._reading.metrics
        return fields
