"""The configuration's sections as pydantic models, one file per subject."""

from moepp_megatron.config.schema.budget import BudgetSection
from moepp_megatron.config.schema.config import Config
from moepp_megatron.config.schema.latent_attention import LatentAttentionSection
from moepp_megatron.config.schema.model import ModelSection
from moepp_megatron.config.schema.moe import MoESection
from moepp_megatron.config.schema.observe import ObserveSection, WandbSection
from moepp_megatron.config.schema.parallel import ParallelSection
from moepp_megatron.config.schema.precision import PrecisionSection
from moepp_megatron.config.schema.resilience import ResilienceSection
from moepp_megatron.config.schema.routing_guard import (
    ForceFFNSection,
    GuardRule,
    RoutingGuardSection,
    ShiftSection,
)
from moepp_megatron.config.schema.run import CheckpointSection, DataSection, RunSection
from moepp_megatron.config.schema.section import Section
from moepp_megatron.config.schema.slurm import SlurmSection
from moepp_megatron.config.schema.training import OptimizerSection, TrainingSection

__all__ = [
    "BudgetSection",
    "CheckpointSection",
    "Config",
    "DataSection",
    "LatentAttentionSection",
    "ModelSection",
    "ForceFFNSection",
    "GuardRule",
    "MoESection",
    "ObserveSection",
    "OptimizerSection",
    "ParallelSection",
    "PrecisionSection",
    "ResilienceSection",
    "RoutingGuardSection",
    "RunSection",
    "Section",
    "ShiftSection",
    "SlurmSection",
    "TrainingSection",
    "WandbSection",
]
