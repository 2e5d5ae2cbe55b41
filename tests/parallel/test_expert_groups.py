"""Group-limited routing trains in every layout what it trains on one process."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.parallel.training_runs import EP2, PP2, TP2, Run, compare, short

# fp32 rounds by 6e-8; sums in another order, carried on by steps of Adam (see test_matrix).
FP32 = 1e-5
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
    "ep2": (2, EP2),
    "tp2 ep4, once to each rank": (4, TP2 | {"expert_model_parallel_size": 4}),
    "pp2": (2, PP2),
}


def limited(dispatcher: str = "alltoall", **sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return short(moe={**MOE, "num_ffn_experts": 8, "dispatcher": dispatcher}, **sections)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(trained, alone: Callable[..., Run], layout: str) -> None:
    world_size, parallel = LAYOUTS[layout]
    dispatcher = "alltoall_dedup" if "once" in layout else "alltoall"
    run = trained(world_size, limited(dispatcher, parallel=parallel))
    compare(run, alone(limited()), FP32)


def test_groups_change_the_model(alone: Callable[..., Run]) -> None:
    """Otherwise the layouts above would have agreed on routing without groups."""
    free = short(moe={**MOE, "num_ffn_experts": 8, "num_groups": 1, "group_topk": 1})
    assert alone(free).losses[0] != alone(limited()).losses[0]
