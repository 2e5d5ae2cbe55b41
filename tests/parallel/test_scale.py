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

    from moepp_megatron.tools.experiments.scaling.measure import measure_point
    from moepp_megatron.tools.experiments.scaling.trials import Measuring

    config, layout = begin(raw)
    measuring = Measuring(("moepp", "vanilla"), warmup=1, steps=1, repeats=2)
    return measure_point(config, layout, measuring, torch.device("cpu")).model_dump()


def test_point_counts_the_bytes_that_its_routing_asks_for(ranks: RankPools) -> None:
    first, second = ranks(2).run(measure, CONFIG)
    assert first == second, "all ranks agree"
    assert (first["tokens"], first["backend"], first["hosts"]) == (80, "gloo", 1)
    moepp, vanilla = first["kinds"]["moepp"], first["kinds"]["vanilla"]
    assert moepp["ffn_fraction"] == pytest.approx(0.5, abs=0.02)  # 40 picks, rounded an expert
    assert vanilla["ffn_fraction"] == 1.0
    for kind in (moepp, vanilla):
        assert len(kind["step_times_s"]) == 2
    # No more than every pick away from home, there and back, each of 32 floats, 2 layers.
    assert vanilla["a2a_bytes"] < 80 * 2 * 2 * 2 * 32 * 4
    assert moepp["a2a_bytes"] < vanilla["a2a_bytes"]
