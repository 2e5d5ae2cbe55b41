"""Rules of `model.mtp_num_layers`: what multi-token prediction excludes."""

from __future__ import annotations

from collections.abc import Iterator

from moepp_megatron.config.problem import Problem, show
from moepp_megatron.config.schema import Config

NAME = "model.mtp_num_layers"


def _further_tokens_stand_where_they_were_tested(config: Config) -> Iterator[Problem]:
    """Parts that do not support the layers behind the decoder, or were never run with them."""
    model, training, parallel = config.model, config.training, config.parallel
    if model.mtp_num_layers == 0:
        return
    conflicts: tuple[tuple[str, object, object, str], ...] = (
        (
            "moe.constants_shared",
            config.moe.shares_constants,
            False,
            "constants that are shared with these layers have not been tested",
        ),
        (
            "model.tie_embeddings",
            model.tie_embeddings and parallel.pipeline_model_parallel_size > 1,
            False,
            "megatron-core's last stage would have an output layer that is not tied, with "
            f"parallel.pipeline_model_parallel_size ({parallel.pipeline_model_parallel_size})",
        ),
        (
            "parallel.overlap_moe_expert_parallel_comm",
            parallel.overlap_moe_expert_parallel_comm,
            False,
            "its schedule has no nodes for these layers that carry router logits",
        ),
        (
            "training.cuda_graphs",
            training.cuda_graphs,
            [],
            "graphs of these layers have not been tested",
        ),
        (
            "precision.fp8_param",
            config.precision.fp8_param,
            False,
            "these layers have not been tested with weights in FP8",
        ),
    )
    for name, value, needed, reason in conflicts:
        if value != needed:
            yield Problem(
                name,
                value,
                f"must be {show(needed)} with {NAME} ({model.mtp_num_layers}): {reason}",
                f"use {show(needed)}, or set {NAME} to 0",
            )
    layers = training.recompute_num_layers
    if training.recompute_granularity == "full" and layers != 1:
        yield Problem(
            "training.recompute_num_layers",
            layers,
            f"must be 1 with {NAME} ({model.mtp_num_layers}), because megatron-core computes those "
            "layers again one by one",
            f"use 1, or set {NAME} to 0",
        )


RULES = (_further_tokens_stand_where_they_were_tested,)
