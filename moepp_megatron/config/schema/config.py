"""The sections of the engine: one per subject, in the order that files are written in."""

from typing import Any

import yaml

from moepp_megatron.config.schema.checkpoint import CheckpointSection
from moepp_megatron.config.schema.data import EngineDataSection
from moepp_megatron.config.schema.megatron import MegatronSection
from moepp_megatron.config.schema.model import EngineModelSection
from moepp_megatron.config.schema.moe import EngineMoESection
from moepp_megatron.config.schema.observe import EngineObserveSection
from moepp_megatron.config.schema.optimizer import OptimizerSection
from moepp_megatron.config.schema.parallel import ParallelSection
from moepp_megatron.config.schema.precision import PrecisionSection
from moepp_megatron.config.schema.resilience import ResilienceSection
from moepp_megatron.config.schema.run import EngineRunSection
from moepp_megatron.config.schema.section import Section
from moepp_megatron.config.schema.slurm import SlurmSection
from moepp_megatron.config.schema.training import EngineTrainingSection


class EngineConfig(Section):
    """The sections of what no run can do without; `features.registry.Config` adds the others."""

    run: EngineRunSection
    """Where a run's files go"""
    model: EngineModelSection
    """Shape of the transformer"""
    moe: EngineMoESection = EngineMoESection()
    """Experts and routing"""
    parallel: ParallelSection = ParallelSection()
    """Layout over ranks"""
    precision: PrecisionSection = PrecisionSection()
    """Number formats"""
    megatron: MegatronSection = MegatronSection()
    """Further settings of megatron-core"""
    data: EngineDataSection = EngineDataSection()
    """The prepared corpus"""
    optimizer: OptimizerSection
    """The optimizer and its schedule"""
    training: EngineTrainingSection
    """Batches, length, logging"""
    checkpoint: CheckpointSection = CheckpointSection()
    """Saving and loading"""
    resilience: ResilienceSection = ResilienceSection()
    """Bad batches, silent divergence, hangs, stragglers"""
    slurm: SlurmSection = SlurmSection()
    """The job of this run on a Slurm cluster"""
    observe: EngineObserveSection = EngineObserveSection()
    """W&B, and where alerts are sent"""

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
        depths: int = self.model.mtp_num_layers  # type: ignore[attr-defined]  # of a feature
        return pattern + pattern[-1:] * depths

    @property
    def layers_per_rank(self) -> int:
        """Layers of the decoder that a pipeline rank has, where they are divided evenly."""
        return self.model.num_layers // self.parallel.pipeline_model_parallel_size

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
        """Return the resolved configuration as YAML that `load_config` reads back to an equal one.

        Each line of `comment`, such as version and commit, becomes a YAML comment at the top.
        """
        header = "".join(f"# {line}\n" for line in comment.splitlines()) if comment else ""
        return header + yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def transformer_fields(self) -> dict[str, Any]:
        """Those that all sections need."""
        sections = [getattr(self, name) for name in type(self).model_fields]
        return {key: value for each in sections for key, value in each.transformer_fields().items()}
