"""Rules of the optimizer's kind: what those of emerging_optimizers need of layout and precision."""

from __future__ import annotations

from collections.abc import Iterator

from moepp_megatron.config.problem import Problem
from moepp_megatron.config.schema import Config


def _whole_matrices_are_shared_out_in_bf16(config: Config) -> Iterator[Problem]:
    """Only fp32 copies of bf16 weights can be shared out (LayerWiseDistributedOptimizer).

    In fp32 it holds torch's optimizers as they are, which have none of megatron-core's methods.
    """
    if not config.optimizer.is_emerging or not config.parallel.use_distributed_optimizer:
        return
    if config.precision.dtype != "bf16":
        yield Problem(
            "parallel.use_distributed_optimizer",
            True,
            f"must be false with optimizer.kind {config.optimizer.kind} and precision.dtype fp32: "
            "megatron-core shares out whole matrices over data-parallel ranks in bf16 alone",
            "set parallel.use_distributed_optimizer to false, or precision.dtype to bf16",
        )


def _emerging_optimizers_gather_after_the_step(config: Config) -> Iterator[Problem]:
    """The overlapped gather works on ranges of flat buffers, which cut matrices in two."""
    if config.optimizer.is_emerging and config.parallel.overlap_param_gather:
        yield Problem(
            "parallel.overlap_param_gather",
            True,
            f"must be false with optimizer.kind {config.optimizer.kind}, whose ranks exchange "
            "whole matrices",
            "set it to false, or optimizer.kind to adam",
        )


def _emerging_optimizers_leave_weights_in_bf16(config: Config) -> Iterator[Problem]:
    """FP8 weights are written by the distributed optimizer of ranges alone."""
    if config.optimizer.is_emerging and config.precision.fp8_param:
        yield Problem(
            "precision.fp8_param",
            True,
            f"must be false with optimizer.kind {config.optimizer.kind}, which does not turn its "
            "fp32 copies into FP8 weights",
            "set it to false, or optimizer.kind to adam",
        )


RULES = (
    _whole_matrices_are_shared_out_in_bf16,
    _emerging_optimizers_gather_after_the_step,
    _emerging_optimizers_leave_weights_in_bf16,
)
