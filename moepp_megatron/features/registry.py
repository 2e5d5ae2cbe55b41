"""The one list of features: settings, parts, and what they check before a run starts.

Parts and checks are named as `module:name`, so that reading a configuration imports no torch.
"""

from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from typing import Any

from moepp_megatron.config.schema.config import EngineConfig
from moepp_megatron.config.schema.data import EngineDataSection
from moepp_megatron.config.schema.model import EngineModelSection
from moepp_megatron.config.schema.moe import EngineMoESection
from moepp_megatron.config.schema.observe import EngineObserveSection
from moepp_megatron.config.schema.run import EngineRunSection
from moepp_megatron.config.schema.training import EngineTrainingSection
from moepp_megatron.features.budget.settings import BudgetSettings
from moepp_megatron.features.callbacks.settings import CallbackSettings
from moepp_megatron.features.data_stages.settings import DataStageSettings
from moepp_megatron.features.distillation.settings import DistillationSection
from moepp_megatron.features.guard.settings import RoutingGuardSection
from moepp_megatron.features.mtp.settings import MultiTokenPredictionSettings
from moepp_megatron.features.profile.settings import ProfileSettings
from moepp_megatron.features.router_health.settings import RouterHealthSettings
from moepp_megatron.features.routes.settings import RoutesSection
from moepp_megatron.features.static_rows.settings import StaticRowsSettings
from moepp_megatron.features.tasks.settings import EvaluationSection
from moepp_megatron.features.telemetry.settings import TelemetrySection
from moepp_megatron.features.tokens.settings import TokenSettings
from moepp_megatron.features.validation.settings import ValidationSets, ValidationSettings


class RunSection(CallbackSettings, EngineRunSection):
    """Settings of a run's folder and name."""


class ModelSection(MultiTokenPredictionSettings, EngineModelSection):
    """Shape of the transformer; names follow megatron-core's TransformerConfig."""


class MoESection(StaticRowsSettings, BudgetSettings, EngineMoESection):  # type: ignore[misc]  # as EngineMoESection
    """Experts, router, balance: the layer's settings, and what surrounds the layer."""


class DataSection(ValidationSets, DataStageSettings, EngineDataSection):
    """The prepared corpus."""


class TrainingSection(ProfileSettings, ValidationSettings, EngineTrainingSection):
    """Settings of batches, length, recomputation and logging."""


class ObserveSection(EngineObserveSection, TokenSettings, RouterHealthSettings):
    """Router measurements, and sinks outside of the run's folder."""


class Config(EngineConfig):
    """A resolved configuration. Build one with `load_config` or `parse_config`."""

    run: RunSection
    """Where a run's files go"""
    model: ModelSection
    """Shape of the transformer"""
    moe: MoESection = MoESection()
    """Experts and routing"""
    data: DataSection = DataSection()
    """The prepared corpus"""
    training: TrainingSection
    """Batches, length, logging"""
    observe: ObserveSection = ObserveSection()
    """W&B, and where alerts are sent"""
    routing_guard: RoutingGuardSection = RoutingGuardSection()
    """Rules over the routers, and what is done where one holds"""
    distillation: DistillationSection = DistillationSection()
    """A teacher besides the text"""
    telemetry: TelemetrySection = TelemetrySection()
    """Power, utilisation, MFU"""
    evaluation: EvaluationSection = EvaluationSection()
    """Tasks of lm-eval while training"""
    routes: RoutesSection = RoutesSection()
    """Router replay, and traces of routing"""


# A part finds those that it needs among the ones before it; alerts of one step come in this order.
PARTS = (
    "features.profile.part:ProfilePart",
    "features.data_stages.part:DataStagesPart",
    "training.parts.routing_counts:RoutingCountsPart",
    "features.static_rows.part:StaticRowsPart",
    "features.router_health.part:RouterHealthPart",
    "features.tokens.part:SourcesPart",
    "features.tokens.part:TokenClassesPart",
    "features.budget.part:BudgetPart",
    "features.guard.part:RoutingGuardPart",
    "training.parts.refused_batches:RefusedBatchesPart",
    "features.distillation.part:DistillationPart",
    "features.mtp.part:MultiTokenPredictionPart",
    "features.routes.part:RoutesPart",
    "features.validation.part:ValidationPart",
    "features.tasks.part:TasksPart",
    "features.telemetry.part:TelemetryPart",
    "features.callbacks.part:CallbacksPart",
)

# What refuses a configuration whose files do not fit; without torch, in every process of a run.
FILE_CHECKS = ("features.distillation.teacher:teacher_config",)
# The configurations of models that a run holds beside its own, for forward passes.
OTHER_MODELS = ("features.distillation.teacher:teacher_config",)
# What takes longer, in one process of a run.
START_CHECKS = ("features.tasks.check:check_tasks",)


def named(rows: Iterable[str]) -> Iterator[Callable[..., Any]]:
    """Import what rows name, one after the other."""
    for row in rows:
        module, _, name = row.partition(":")
        yield getattr(import_module(f"moepp_megatron.{module}"), name)
