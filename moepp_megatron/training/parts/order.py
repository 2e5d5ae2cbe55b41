"""The list of parts, in the order in which they are called."""

from __future__ import annotations

from collections.abc import Callable

from moepp_megatron.training.part import Part, Run
from moepp_megatron.training.parts.budget import BudgetControl
from moepp_megatron.training.parts.data_stages import DataStages
from moepp_megatron.training.parts.distillation import Distillation
from moepp_megatron.training.parts.mtp import MultiTokenPrediction
from moepp_megatron.training.parts.profile import Profile
from moepp_megatron.training.parts.refused_batches import RefusedBatches
from moepp_megatron.training.parts.router_health import HealthCollector
from moepp_megatron.training.parts.routes import RouteFiles
from moepp_megatron.training.parts.routing_counts import RoutingCounts
from moepp_megatron.training.parts.routing_guard import RoutingGuard
from moepp_megatron.training.parts.shift import Shift
from moepp_megatron.training.parts.sources import SourceCollector
from moepp_megatron.training.parts.tasks import TaskEvaluation
from moepp_megatron.training.parts.telemetry import Telemetry
from moepp_megatron.training.parts.token_groups import GroupCollector
from moepp_megatron.training.parts.validation import Validation

# A row a feature, in the order in which parts are called. A part finds those that it needs among
# the ones before it; alerts of one step come in this order.
PARTS: tuple[Callable[[Run], Part | None], ...] = (
    Profile.of,
    DataStages.of,
    RoutingCounts.of,
    HealthCollector.of,
    SourceCollector.of,
    GroupCollector.of,
    BudgetControl.of,
    Shift.of,
    RoutingGuard.of,
    RefusedBatches.of,
    Distillation.of,
    MultiTokenPrediction.of,
    RouteFiles.of,
    Validation.of,
    TaskEvaluation.of,
    Telemetry.of,
)


def build_parts(run: Run) -> list[Part]:
    """The parts of a run, in order; every rank must call."""
    for make in PARTS:
        part = make(run)
        if part is not None:
            run.parts.append(part)
    return run.parts
