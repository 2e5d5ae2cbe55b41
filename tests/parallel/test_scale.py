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
    import torch.distributed as dist

    from moepp_megatron.tools.bench.step import run_step_benchmark

    original = dist.all_to_all_single
    found = run_step_benchmark(*begin(raw), rounds=2)
    assert dist.all_to_all_single is original
    return found


def test_bytes_are_those_that_the_routing_asks_for(ranks):
    first, second = ranks(2).run(measure, CONFIG)
    assert (first["ranks"], first["tokens"]) == (2, 80)
    assert first["measured_ffn_fraction"] == pytest.approx(
        0.5, abs=0.02
    )  # 40 picks, rounded an expert
    # No more than every pick away from home, there and back, each of 32 floats, 2 layers.
    assert first["vanilla_a2a_bytes"] == second["vanilla_a2a_bytes"] < 80 * 2 * 2 * 2 * 32 * 4
    assert first["moepp_a2a_bytes"] == second["moepp_a2a_bytes"] < first["vanilla_a2a_bytes"]
    for kind in ("vanilla", "moepp"):
        assert 0 < first[f"{kind}_a2a_time_s"] == second[f"{kind}_a2a_time_s"]


def count_static_passes(raw):
    from unittest import mock

    from moepp_megatron.moe.static_dispatcher import StaticTokenDispatcher
    from moepp_megatron.tools.bench.step import run_step_benchmark

    begun = StaticTokenDispatcher.dispatch_preprocess
    with mock.patch.object(
        StaticTokenDispatcher, "dispatch_preprocess", autospec=True, side_effect=begun
    ) as passes:
        found = run_step_benchmark(*begin(raw), rounds=2)
    return passes.call_count, found


def test_static_rows_are_timed_beside_both(ranks):
    raw = {**CONFIG, "moe": {**CONFIG["moe"], "static_rows": 1.5}}
    for passes, found in ranks(2).run(count_static_passes, raw):
        # Two layers and two micro-batches, in two rounds and two before them.
        assert passes == 2 * 2 * (2 + 2)
        assert found["static_rows_ms"] > 0


def test_dispatcher_without_all_to_alls_has_no_time(ranks):
    raw = {**CONFIG, "moe": {**CONFIG["moe"], "dispatcher": "allgather"}}
    first, _ = ranks(2).run(measure, raw)
    assert first["vanilla_a2a_time_s"] is first["moepp_a2a_time_s"] is None
