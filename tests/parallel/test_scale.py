"""Timed steps of MoE++ and vanilla on gloo ranks, of which scaling tests are made."""

import pytest

from tests.parallel.training_runs import EP2, begin, settings

CONFIG = settings(
    # The plain start: routing is even.
    model={"num_layers": 2, "seq_length": 20, "init_method_std": 0.02},
    moe={"num_ffn_experts": 4, "num_constant_experts": 1},
    parallel=EP2,
    training={"global_batch_size": 4, "micro_batch_size": 1},
)


def measure(raw):
    from moepp_megatron.tools.bench.step import run_step_benchmark

    return run_step_benchmark(*begin(raw), rounds=2)


def test_bytes_are_those_that_the_routing_asks_for(ranks):
    first, second = ranks(2).run(measure, CONFIG)
    assert (first["ranks"], first["tokens"]) == (2, 80)
    assert first["measured_ffn_fraction"] == pytest.approx(
        0.5, abs=0.02
    )  # 40 picks, rounded an expert
    # No more than every pick away from home, there and back, each of 32 floats, 2 layers.
    assert first["vanilla_a2a_bytes"] == second["vanilla_a2a_bytes"] < 80 * 2 * 2 * 2 * 32 * 4
    assert first["moepp_a2a_bytes"] == second["moepp_a2a_bytes"] < first["vanilla_a2a_bytes"]
