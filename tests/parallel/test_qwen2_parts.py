"""Biases of queries, keys and values, and the shared expert's gate, in every kind of layout."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel.ranks import RankPools
from tests.parallel.training_runs import TP2, Run, assemble, compare, short, train

# fp32 rounds by 6e-8; sums in another order, carried on by steps of Adam (see test_matrix).
FP32 = 1e-5
STEPS = 2
MODEL: dict[str, Any] = {"qkv_bias": True}
MOE: dict[str, Any] = {
    "num_ffn_experts": 8,
    "shared_expert_ffn_hidden_size": 32,
    "shared_expert_gate": True,
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, TP2),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "tp2 ep2 dp2": (4, TP2 | {"expert_model_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def one_process(ranks: RankPools) -> Run:
    return assemble(ranks(1).run(train, short(model=MODEL, moe=MOE), STEPS))


def test_they_are_trained(one_process: Run) -> None:
    names = {name for name in one_process.gradients if "bias" in name or "gate_weight" in name}
    assert any(name.endswith("linear_qkv.bias") for name in names), names
    assert any(name.endswith("shared_experts.gate_weight") for name in names), names


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(ranks: RankPools, one_process: Run, layout: str) -> None:
    world_size, parallel = LAYOUTS[layout]
    raw = short(model=MODEL, moe=MOE, parallel=parallel)
    compare(assemble(ranks(world_size).run(train, raw, STEPS)), one_process, FP32)
