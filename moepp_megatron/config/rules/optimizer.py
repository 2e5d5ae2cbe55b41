"""Rules of the optimizer's kind: what those of emerging_optimizers need of layout and precision."""

from __future__ import annotations

from collections.abc import Iterator

from moepp_megatron.config.problem import Problem
from moepp_megatron.config.schema import Config


def _emerging_optimizers_take_whole_matrices(config: Config) -> Iterator[Problem]:
    """They share out, gather and write whole matrices, each where megatron-core has a way to.

    Only fp32 copies of bf16 weights can be shared out: in fp32 `LayerWiseDistributedOptimizer`
    holds torch's optimizers as they are, which have none of megatron-core's methods. The overlapped
    gather works on ranges of flat buffers, and FP8 weights are written by the optimizer of ranges.
    """
    optimizer, parallel, precision = config.optimizer, config.parallel, config.precision
    if not optimizer.is_emerging:
        return
    conflicts = (
        (
            "parallel.use_distributed_optimizer",
            parallel.use_distributed_optimizer and precision.dtype != "bf16",
            " and precision.dtype fp32: megatron-core shares out whole matrices over data-parallel "
            "ranks in bf16 alone",
            "set parallel.use_distributed_optimizer to false, or precision.dtype to bf16",
        ),
        (
            "parallel.overlap_param_gather",
            parallel.overlap_param_gather,
            ", whose ranks exchange whole matrices",
            "set it to false, or optimizer.kind to adam",
        ),
        (
            "precision.fp8_param",
            precision.fp8_param,
            ", which does not turn its fp32 copies into FP8 weights",
            "set it to false, or optimizer.kind to adam",
        ),
    )
    for name, is_set, reason, remedy in conflicts:
        if is_set:
            rule = f"must be false with optimizer.kind {optimizer.kind}{reason}"
            yield Problem(name, True, rule, remedy)


RULES = (_emerging_optimizers_take_whole_matrices,)
