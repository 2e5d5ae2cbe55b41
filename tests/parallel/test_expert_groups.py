"""Group-limited routing trains in every layout what it trains on one process."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel.ranks import RankPools
from tests.parallel.training_runs import EP2, TP2, Run, assemble, compare, settings, train

# fp32 rounds by 6e-8; sums in another order, carried on by steps of Adam (see test_matrix).
FP32 = 1e-5
STEPS = 3
# Four groups of two experts: a rank of EP 2 has two of them, a rank of EP 4 one.
MOE: dict[str, Any] = {
    "num_groups": 4,
    "group_topk": 2,
    "router_topk": 3,
    "num_zero_experts": 2,
    "selection_bias": True,
    "capacity_factor": 1.1,
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ep2": (2, {"expert_model_parallel_size": 2}),
    "ep4, once to each rank": (4, {"expert_model_parallel_size": 4}),
    "tp2 ep2": (2, TP2 | EP2),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
}


def limited(dispatcher: str = "alltoall", **sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return settings(moe={**MOE, "num_ffn_experts": 8, "dispatcher": dispatcher}, **sections)


@pytest.fixture(scope="module")
def one_process(ranks: RankPools) -> Run:
    return assemble(ranks(1).run(train, limited(), STEPS))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(ranks: RankPools, one_process: Run, layout: str) -> None:
    world_size, parallel = LAYOUTS[layout]
    dispatcher = "alltoall_dedup" if "once" in layout else "alltoall"
    run = assemble(ranks(world_size).run(train, limited(dispatcher, parallel=parallel), STEPS))
    compare(run, one_process, FP32)


def test_groups_change_the_model(ranks: RankPools, one_process: Run) -> None:
    """Otherwise the layouts above would have agreed on routing without groups."""
    free = settings(moe={**MOE, "num_ffn_experts": 8, "num_groups": 1, "group_topk": 1})
    run = assemble(ranks(1).run(train, free, STEPS))
    assert run.losses[0] != one_process.losses[0]
