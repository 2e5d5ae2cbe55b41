"""Rules of `training.cuda_graphs`: which parts of a layer can be captured, with which settings."""

from __future__ import annotations

from collections.abc import Iterator

from moepp_megatron.config.problem import Problem
from moepp_megatron.config.schema import Config

_CAPTURABLE = ("attn", "moe_router")
# megatron-core's other parts, with the reason against each.
_REASONS = {
    "mlp": "a dense FFN is not captured by the MoE++ layer",
    "moe": "an expert gets another number of tokens in every step, and a graph's sizes are fixed",
    "moe_preprocess": "the all-to-all's sizes are read on the host, which no graph can do",
    "mamba": "there is no such layer here",
}


def _graphs_name_capturable_parts(config: Config) -> Iterator[Problem]:
    """A graph is a fixed sequence of kernels with fixed sizes, without input from the host."""
    parts = config.training.cuda_graphs
    unknown = [part for part in parts if part not in _CAPTURABLE]
    if unknown:
        reason = _REASONS.get(unknown[0], "there is no such part")
        yield Problem(
            "training.cuda_graphs",
            parts,
            f"must hold only {' and '.join(_CAPTURABLE)}, because of {unknown[0]}: {reason}",
            "use [attn, moe_router]",
        )


def _graphs_stand_alone(config: Config) -> Iterator[Problem]:
    """Graphs exclude settings that run parts of a layer twice, elsewhere, or with other effects."""
    training, moe = config.training, config.moe
    if not training.cuda_graphs or set(training.cuda_graphs) - set(_CAPTURABLE):
        return
    routes = "moe_router" in training.cuda_graphs
    conflicts = (
        (
            training.recompute_granularity is not None,
            f"training.recompute_granularity ({training.recompute_granularity}) null: a graph "
            "keeps its activations, and runs forward once for every backward pass",
        ),
        (
            config.parallel.overlap_moe_expert_parallel_comm,
            "parallel.overlap_moe_expert_parallel_comm (true) false: that schedule calls the "
            "parts of a layer itself",
        ),
        (
            moe.is_vanilla,
            "zero-computation experts or moe.gating_residual: for vanilla layers megatron-core's "
            "attn captures the experts as well, whose sizes are not fixed",
        ),
        (
            config.precision.fp8 is not None,
            f"precision.fp8 ({config.precision.fp8}) null: megatron-core registers the FP8 state "
            "of a whole layer with each of its graphs, so that experts' scales would be "
            "updated twice",
        ),
        (
            routes and moe.z_loss_coeff is not None,
            f"moe.z_loss_coeff ({moe.z_loss_coeff}) null beside moe_router: the loss is recorded "
            "by the host, which a graph does not repeat",
        ),
        (
            routes and moe.input_jitter_eps is not None,
            f"moe.input_jitter_eps ({moe.input_jitter_eps}) null beside moe_router: noise inside "
            "a graph has not been tested",
        ),
    )
    for conflict, need in conflicts:
        if conflict:
            yield Problem(
                "training.cuda_graphs",
                training.cuda_graphs,
                f"must have {need}",
                "change that, or set training.cuda_graphs to []",
            )


RULES = (_graphs_name_capturable_parts, _graphs_stand_alone)
