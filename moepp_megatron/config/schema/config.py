"""The whole configuration: one section per subject, in the order that files are written in."""

from __future__ import annotations

import yaml

from moepp_megatron.config.schema.distillation import DistillationSection
from moepp_megatron.config.schema.evaluation import EvaluationSection
from moepp_megatron.config.schema.megatron import MegatronSection
from moepp_megatron.config.schema.model import ModelSection
from moepp_megatron.config.schema.moe import MoESection
from moepp_megatron.config.schema.observe import ObserveSection, TelemetrySection
from moepp_megatron.config.schema.optimizer import OptimizerSection
from moepp_megatron.config.schema.parallel import ParallelSection
from moepp_megatron.config.schema.precision import PrecisionSection
from moepp_megatron.config.schema.resilience import ResilienceSection
from moepp_megatron.config.schema.routes import RoutesSection
from moepp_megatron.config.schema.routing_guard import RoutingGuardSection
from moepp_megatron.config.schema.run import CheckpointSection, DataSection, RunSection
from moepp_megatron.config.schema.section import Section
from moepp_megatron.config.schema.slurm import SlurmSection
from moepp_megatron.config.schema.training import TrainingSection


class Config(Section):
    """A resolved configuration. Build one with `load_config` or `parse_config`."""

    run: RunSection
    """Where a run's files go"""
    model: ModelSection
    """Shape of the transformer"""
    moe: MoESection = MoESection()
    """Experts and routing"""
    parallel: ParallelSection = ParallelSection()
    """Layout over ranks"""
    precision: PrecisionSection = PrecisionSection()
    """Number formats"""
    megatron: MegatronSection = MegatronSection()
    """Further settings of megatron-core"""
    data: DataSection = DataSection()
    """The prepared corpus"""
    optimizer: OptimizerSection
    """The optimizer and its schedule"""
    training: TrainingSection
    """Batches, length, logging"""
    distillation: DistillationSection = DistillationSection()
    """A teacher besides the text"""
    checkpoint: CheckpointSection = CheckpointSection()
    """Saving and loading"""
    resilience: ResilienceSection = ResilienceSection()
    """Bad batches, silent divergence, hangs, stragglers"""
    slurm: SlurmSection = SlurmSection()
    """The job of this run on a Slurm cluster"""
    telemetry: TelemetrySection = TelemetrySection()
    """Power, utilisation, MFU"""
    observe: ObserveSection = ObserveSection()
    """W&B, and where alerts are sent"""
    evaluation: EvaluationSection = EvaluationSection()
    """Tasks of lm-eval while training"""
    routes: RoutesSection = RoutesSection()
    """Router replay, and traces of routing"""
    routing_guard: RoutingGuardSection = RoutingGuardSection()
    """Rules over the routers, and what is done where one holds"""

    @property
    def expert_ffn_hidden_size(self) -> int:
        """Inner width of an FFN expert, the default resolved."""
        return self.moe.ffn_hidden_size or self.model.ffn_hidden_size

    @property
    def router_pattern(self) -> list[bool]:
        """For each layer of the decoder and of multi-token prediction, whether it has experts.

        The latter follow the decoder's and are of the kind of its last one.
        """
        pattern = self.moe.moe_layer_pattern(self.model.num_layers)
        return pattern + pattern[-1:] * self.model.mtp_num_layers

    @property
    def warmup_iters(self) -> int:
        """Steps of warm-up: `optimizer.warmup_iters`, or a tenth of a run that is no longer.

        With `optimizer.decay_iters` the schedule has a length of its own, in every part of a run.
        """
        warmup, steps = self.optimizer.warmup_iters, self.training.train_iters
        if warmup < steps or self.optimizer.decay_iters is not None:
            return warmup
        return max(steps // 10, min(1, steps - 1))

    @property
    def tokens_per_rank(self) -> int:
        """Tokens of a micro-batch that a rank routes, T."""
        parallel = self.parallel
        ranks = parallel.context_parallel_size * parallel.tensor_model_parallel_size
        return self.model.seq_length * self.training.micro_batch_size // ranks

    def to_yaml(self, comment: str | None = None) -> str:
        """The resolved configuration as YAML that `load_config` reads back to an equal one.

        Args:
            comment: Text for the top of the file, such as version and git commit; each of its
                lines becomes a YAML comment.
        """
        header = "".join(f"# {line}\n" for line in comment.splitlines()) if comment else ""
        return header + yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
