"""Rules of `parallel.overlap_moe_expert_parallel_comm`, the combined forward and backward pass.

megatron-core asserts most of these; without the others its schedule would be wrong.
"""

from __future__ import annotations

from moepp_megatron.config.problem import show
from moepp_megatron.config.rows import Condition, Rule, Text, group, refuse
from moepp_megatron.config.schema import Config
from moepp_megatron.config.stages import virtual_stages


def _split(config: Config) -> list[str]:
    """List recomputed modules that the schedule splits between its nodes."""
    training = config.training
    is_selective = training.recompute_granularity == "selective"
    return sorted({"layernorm", "moe"} & set(training.recompute_modules)) if is_selective else []


def _has_plain_pipeline(config: Config) -> bool:
    try:
        return config.parallel.pipeline_model_parallel_size > 1 and virtual_stages(config) <= 1
    except ValueError:
        return False  # A layout that cannot be read is refused by a rule of its own.


def _without_split_modules(config: Config) -> str:
    modules, split = show(config.training.recompute_modules), " and ".join(_split(config))
    must = f"must have training.recompute_modules ({modules}) without {split}"
    return f"{must}: the schedule runs their parts separately"


def _needs(wrong: Condition, must: Text) -> Rule:
    return refuse(
        "parallel.overlap_moe_expert_parallel_comm",
        wrong,
        must,
        "change that, or set parallel.overlap_moe_expert_parallel_comm to false",
    )


RULES: tuple[Rule, ...] = (
    group(
        lambda c: c.parallel.overlap_moe_expert_parallel_comm,
        _needs(
            lambda c: c.parallel.expert_model_parallel_size == 1,
            "must have parallel.expert_model_parallel_size (1) above 1: no token travels",
        ),
        _needs(
            lambda c: c.precision.dtype != "bf16",
            "must have precision.dtype ({precision.dtype}) bf16, which megatron-core's schedule "
            "asks for",
        ),
        _needs(
            lambda c: c.moe.dispatcher not in ("alltoall", "flex"),
            "must have moe.dispatcher ({moe.dispatcher}) alltoall or flex: the schedule frees "
            "what a dispatcher has sent, so it must have arrived when the call returns",
        ),
        _needs(
            _has_plain_pipeline,
            "must have parallel.virtual_pipeline_model_parallel_size (null) 2 or more with "
            "parallel.pipeline_model_parallel_size ({parallel.pipeline_model_parallel_size}): "
            "the plain 1F1B schedule has no combined form",
        ),
        _needs(
            lambda c: c.training.recompute_granularity == "full",
            "must have training.recompute_granularity (full) null or selective: whole layers are "
            "no longer one piece of the schedule",
        ),
        _needs(_split, _without_split_modules),
    ),
    # No other schedule comes back for the weights (transformer_config.py, `__post_init__`).
    refuse(
        "parallel.delay_wgrad_compute",
        lambda c: (
            c.parallel.delay_wgrad_compute and not c.parallel.overlap_moe_expert_parallel_comm
        ),
        "must come with parallel.overlap_moe_expert_parallel_comm (false), whose schedule "
        "computes the gradients that are left out at first",
        "set that to true, or parallel.delay_wgrad_compute to false",
    ),
)
