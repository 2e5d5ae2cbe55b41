"""Rules of `parallel.overlap_moe_expert_parallel_comm`, the combined forward and backward pass."""

from __future__ import annotations

from collections.abc import Iterator

from moepp_megatron.config.problem import Problem, show
from moepp_megatron.config.schema import Config
from moepp_megatron.config.stages import virtual_stages

# What these recompute lies in two parts of a layer that the schedule runs as graphs of their own.
_SPLIT_MODULES = ("layernorm", "moe")


def _overlapped_experts_have_their_parts(config: Config) -> Iterator[Problem]:
    """megatron-core asserts most of these; without the others its schedule would be wrong."""
    parallel, training = config.parallel, config.training
    if not parallel.overlap_moe_expert_parallel_comm:
        return
    ranks, dispatcher = parallel.expert_model_parallel_size, config.moe.dispatcher
    stages = parallel.pipeline_model_parallel_size
    recomputed = sorted(set(_SPLIT_MODULES) & set(training.recompute_modules))
    is_selective = training.recompute_granularity == "selective"
    needs = (
        (ranks > 1, f"parallel.expert_model_parallel_size ({ranks}) above 1: no token travels"),
        (
            config.precision.dtype == "bf16",
            f"precision.dtype ({config.precision.dtype}) bf16, which megatron-core's schedule "
            "asks for",
        ),
        (
            dispatcher in ("alltoall", "flex"),
            f"moe.dispatcher ({dispatcher}) alltoall or flex: the schedule frees what a "
            "dispatcher has sent, so it must have arrived when the call returns",
        ),
        (
            stages == 1 or virtual_stages(config) > 1,
            "parallel.virtual_pipeline_model_parallel_size (null) 2 or more with "
            f"parallel.pipeline_model_parallel_size ({stages}): the plain 1F1B schedule has no "
            "combined form",
        ),
        (
            training.recompute_granularity != "full",
            "training.recompute_granularity (full) null or selective: whole layers are no longer "
            "one piece of the schedule",
        ),
        (
            not (is_selective and recomputed),
            f"training.recompute_modules ({show(training.recompute_modules)}) without "
            f"{' and '.join(recomputed)}: the schedule runs their parts separately",
        ),
    )
    for holds, need in needs:
        if not holds:
            yield Problem(
                "parallel.overlap_moe_expert_parallel_comm",
                True,
                f"must have {need}",
                "change that, or set parallel.overlap_moe_expert_parallel_comm to false",
            )


def _only_the_combined_schedule_delays(config: Config) -> Iterator[Problem]:
    """No other schedule comes back for the weights (transformer_config.py, `__post_init__`)."""
    parallel = config.parallel
    if parallel.delay_wgrad_compute and not parallel.overlap_moe_expert_parallel_comm:
        yield Problem(
            "parallel.delay_wgrad_compute",
            True,
            "must come with parallel.overlap_moe_expert_parallel_comm (false), whose schedule "
            "computes the gradients that are left out at first",
            "set that to true, or parallel.delay_wgrad_compute to false",
        )


RULES = (_overlapped_experts_have_their_parts, _only_the_combined_schedule_delays)
