"""The routing guard as a part of the run: what it judges a step by, and what follows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from moepp_megatron.config import Layout
from moepp_megatron.config.guard_rules import is_watched
from moepp_megatron.observe.alerts import Alert
from moepp_megatron.training.guard.control import RoutingGuard
from moepp_megatron.training.part import GoBack, Outcome, Part, Run, Step
from moepp_megatron.training.parts.batch_losses import BatchLoss, BatchLosses
from moepp_megatron.training.parts.budget import BudgetControl
from moepp_megatron.training.parts.router_health import HealthCollector
from moepp_megatron.training.parts.routing_counts import RoutingCounts
from moepp_megatron.training.parts.shift import Shift
from moepp_megatron.training.parts.token_groups import GroupCollector
from moepp_megatron.training.step import StepResult


class RoutingGuardPart(Part):
    """Judges every step's routers.

    Args:
        run: The run; its routers are watched.
    """

    def __init__(self, run: Run) -> None:
        self._losses = run.require(BatchLosses)
        self._budget, self._shift = run.find(BudgetControl), run.find(Shift)
        counts, health = run.require(RoutingCounts), run.require(HealthCollector)
        groups = run.find(GroupCollector)
        self._guard = RoutingGuard(
            run.config, run.model, counts, health, groups, run.extra.get("guard")
        )

    @classmethod
    def of(cls, run: Run) -> RoutingGuardPart | None:
        """The part of a run; None where routers are not watched."""
        return cls(run) if is_watched(run.config) else None

    def begin_step(self, step: int, layout: Layout) -> None:
        """Carry out what was decided."""
        self._guard.begin_step(step, self._budget)

    def judge(self, step: Step) -> Iterator[Outcome]:
        """Judge a step, or the routing of a refused batch."""
        if not step.is_finite:
            return
        judged: tuple[StepResult, BatchLoss] = step.result, self._losses.newest
        if self._shift is None:
            verdict = self._guard.end_step(step.number, *judged)
        else:
            shift = self._shift
            verdict = self._guard.end_step(step.number, *judged, shift.reading, shift.explain)
        yield from verdict.alerts
        if verdict.rollbacks:
            newest = step.number - verdict.healthy_steps_ago
            yield GoBack(newest, lambda at: verdict.rollback_alerts(step.number, at, newest))

    def record(self, step: Step, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Actions in force, and tau where it is raised."""
        return self._guard.metrics()

    def state(self) -> dict[str, Any]:
        """Rules, actions and copies of routers; a collective."""
        return {"guard": self._guard.state()}

    def roll_back(self, step: int, extra: Mapping[str, Any]) -> Iterable[Alert]:
        """Take over the guard of a checkpoint; alerts of actions that end."""
        return self._guard.go_back(step, extra.get("guard"))

    def begin_anew(self, step: int) -> Iterable[Alert]:
        """Reset all rules; alerts of actions that end."""
        return self._guard.announce_stage(step)
