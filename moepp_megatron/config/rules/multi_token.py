"""Rules of `model.mtp_num_layers`: what multi-token prediction needs of other settings."""

from __future__ import annotations

from moepp_megatron.config.rows import Rule, group, refuse
from moepp_megatron.config.schema import Config


def _recomputes_several(config: Config) -> bool:
    training = config.training
    return training.recompute_granularity == "full" and training.recompute_num_layers != 1


RULES: tuple[Rule, ...] = (
    group(
        lambda c: c.model.mtp_num_layers > 0,
        refuse(
            "model.tie_embeddings",
            lambda c: c.model.tie_embeddings and c.parallel.pipeline_model_parallel_size > 1,
            "must be false with model.mtp_num_layers ({model.mtp_num_layers}): megatron-core's "
            "last stage would have an output layer that is not tied, with "
            "parallel.pipeline_model_parallel_size ({parallel.pipeline_model_parallel_size})",
            "use false, or set model.mtp_num_layers to 0",
        ),
        refuse(
            "training.recompute_num_layers",
            _recomputes_several,
            "must be 1 with model.mtp_num_layers ({model.mtp_num_layers}), because megatron-core "
            "computes those layers again one by one",
            "use 1, or set model.mtp_num_layers to 0",
        ),
    ),
)
