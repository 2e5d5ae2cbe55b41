"""One point of a scaling test on gloo ranks: what is counted there, and the clock itself."""

from typing import Any

import pytest

from tests.parallel.ranks import RankPools
from tests.parallel.training_runs import EP2, begin, settings

CONFIG = settings(
    # The plain start: routing is even.
    model={"num_layers": 2, "seq_length": 20, "init_method_std": 0.02},
    moe={"num_ffn_experts": 4, "num_constant_experts": 1},
    parallel=EP2,
    training={"global_batch_size": 4, "micro_batch_size": 1},
)


def measure(raw: dict[str, Any]) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from moepp_megatron.workbench.experiments.scaling.measure import measure_point
    from moepp_megatron.workbench.experiments.scaling.trials import Measuring

    config, layout = begin(raw)
    measuring = Measuring(("moepp", "vanilla"), warmup=1, steps=1, repeats=2)
    original = dist.all_to_all_single
    result = measure_point(config, layout, measuring, torch.device("cpu"))
    assert dist.all_to_all_single is original, "the clock leaves no trace"
    return result.model_dump()


def test_point_counts_the_bytes_that_its_routing_asks_for(ranks: RankPools) -> None:
    first, second = ranks(2).run(measure, CONFIG)
    assert first == second, "all ranks agree"
    assert (first["tokens"], first["backend"], first["hosts"]) == (80, "gloo", 1)
    moepp, vanilla = first["kinds"]["moepp"], first["kinds"]["vanilla"]
    assert moepp["ffn_fraction"] == pytest.approx(0.5, abs=0.02)  # 40 picks, rounded an expert
    assert vanilla["ffn_fraction"] == 1.0
    for kind in (moepp, vanilla):
        assert len(kind["step_times_s"]) == 2
        # Counted at the call, forward and backward, against counted from the routing, forward.
        assert kind["a2a_sent_bytes"] == 2 * kind["a2a_bytes"] > 0
        assert 0 < kind["a2a_time_min_s"] <= kind["a2a_time_s"] <= kind["a2a_time_max_s"]
        assert 0 < kind["a2a_share"] < 1
    # No more than every pick away from home, there and back, each of 32 floats, 2 layers.
    assert vanilla["a2a_bytes"] < 80 * 2 * 2 * 2 * 32 * 4
    assert moepp["a2a_bytes"] < vanilla["a2a_bytes"]


def test_dispatcher_without_all_to_alls_has_no_time(ranks: RankPools) -> None:
    raw = {**CONFIG, "moe": {**CONFIG["moe"], "dispatcher": "allgather"}}
    first, _ = ranks(2).run(measure, raw)
    assert first["kinds"]["moepp"]["a2a_time_s"] is None
    assert first["kinds"]["moepp"]["a2a_share"] is None
    assert first["kinds"]["moepp"]["step_times_s"]


def clock_on_a_scripted_network() -> dict[str, float]:
    """A call takes 2 s, waiting 3 s, work between them 100 s, by a clock that the test turns."""
    from types import SimpleNamespace

    import torch
    import torch.distributed as dist

    from moepp_megatron.workbench.bench import all_to_all_clock as module

    now = [0.0]

    def turn(seconds: float) -> None:
        now[0] += seconds

    def call(output: Any, input: Any, receive: Any, send: Any, group: Any, async_op: bool) -> Any:
        turn(2.0)
        return SimpleNamespace(wait=lambda: turn(3.0), is_completed=lambda: "asked")

    alone, _ = dist.new_subgroups(1)
    everyone = dist.group.WORLD
    original, real_time = dist.all_to_all_single, module.time
    dist.all_to_all_single = call
    module.time = SimpleNamespace(perf_counter=lambda: now[0])
    try:
        clock = module.AllToAllClock(everyone, hidden_size=3, on_gpu=False)
        rows = torch.ones(4, 3)
        send = [1, 3]
        with clock.running():
            dist.all_to_all_single(rows, rows, [2, 2], send, group=everyone)
            work = dist.all_to_all_single(rows, rows, [2, 2], send, group=everyone, async_op=True)
            turn(100.0)
            work.wait()
            assert work.is_completed() == "asked"
            # No hidden vectors, in equal parts; then another group, and no group.
            dist.all_to_all_single(torch.ones(4), torch.ones(4), group=everyone)
            dist.all_to_all_single(rows, rows, [4], [4], group=alone)
            dist.all_to_all_single(rows, rows, [2, 2], [2, 2])
        assert dist.all_to_all_single is call
    finally:
        dist.all_to_all_single, module.time = original, real_time
    return {
        "seconds": clock.seconds(),
        "vectors": clock.vector_bytes,
        "other": clock.other_bytes,
        "calls": clock.calls,
    }


def test_clock_counts_calls_and_waits_but_not_what_is_hidden(ranks: RankPools) -> None:
    for rank, found in enumerate(ranks(2).run(clock_on_a_scripted_network)):
        # Three calls of 2 s and one wait of 3 s.
        assert (found["seconds"], found["calls"]) == (9.0, 3)
        # Rank 0 sends 3 of 4 rows away, rank 1 one of them; twice, 3 floats each.
        assert found["vectors"] == 2 * (3, 1)[rank] * 3 * 4
        assert found["other"] == 2 * 4
