"""Settings of multi-token prediction in the section `model`."""

from typing import Annotated, Any, ClassVar

from moepp_megatron.config.rows import group, no_effect_with, refuse, table
from moepp_megatron.config.schema.section import Section, Unit


class MultiTokenPredictionSettings(Section):
    """Layers of multi-token prediction, and the weight of their loss."""

    mtp_num_layers: Annotated[int, Unit("layers", ge=0, le=16)] = 0
    """Layers of multi-token prediction, each of which predicts one token further; 0: off"""
    mtp_loss_scaling_factor: Annotated[float, Unit("1", gt=0.0, le=10.0)] = 0.1
    """Weight of the loss of these layers, of all together"""

    def transformer_fields(self) -> dict[str, Any]:
        """The settings by megatron-core's names."""
        return {
            "mtp_num_layers": self.mtp_num_layers or None,
            "mtp_loss_scaling_factor": self.mtp_loss_scaling_factor,
        }

    megatron_flags: ClassVar[str] = "mtp-num-layers mtp-loss-scaling-factor"
    own_rules = table(
        group(
            "model.mtp_num_layers",
            refuse(
                "model.tie_embeddings",
                "model.tie_embeddings and not parallel.pipeline_model_parallel_size 1",
                "must be false with model.mtp_num_layers ({model.mtp_num_layers}): megatron-core's "
                "last stage would have an output layer that is not tied, with "
                "parallel.pipeline_model_parallel_size ({parallel.pipeline_model_parallel_size})",
                "use false, or set model.mtp_num_layers to 0",
            ),
            refuse(
                "training.recompute_num_layers",
                "training.recompute_granularity full and not training.recompute_num_layers 1",
                "must be 1 with model.mtp_num_layers ({model.mtp_num_layers}), because "
                "megatron-core computes those layers again one by one",
                "use 1, or set model.mtp_num_layers to 0",
            ),
        ),
    )
    excludes = table(
        (
            "moe.constants_shared",
            "model.mtp_num_layers",
            "constants that are shared with these layers have not been tested",
        ),
        (
            "parallel.overlap_moe_expert_parallel_comm",
            "model.mtp_num_layers",
            "its schedule has no nodes for these layers that carry router logits",
        ),
        (
            "training.cuda_graphs",
            "model.mtp_num_layers",
            "graphs of these layers have not been tested",
        ),
        (
            "precision.fp8_param",
            "model.mtp_num_layers",
            "these layers have not been tested with weights in FP8",
        ),
    )
    no_effect = table(
        no_effect_with(
            "model.mtp_num_layers",
            0,
            "model.mtp_loss_scaling_factor",
            "set model.mtp_num_layers above 0",
        ),
    )
