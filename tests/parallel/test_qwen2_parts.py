"""Biases of queries, keys and values, and the shared expert's gate, in every kind of layout."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.parallel.training_runs import EP2, PP2, TP2, Run, compare, short

# fp32 rounds by 6e-8; sums in another order, carried on by steps of Adam (see test_matrix).
FP32 = 1e-5
MODEL: dict[str, Any] = {"qkv_bias": True}
MOE: dict[str, Any] = {
    "num_ffn_experts": 8,
    "shared_expert_ffn_hidden_size": 32,
    "shared_expert_gate": True,
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {"pp2": (2, PP2), "tp2 ep2 dp2": (4, TP2 | EP2)}


def test_they_are_trained(alone: Callable[..., Run]) -> None:
    gradients = alone(short(model=MODEL, moe=MOE)).gradients
    names = {name for name in gradients if "bias" in name or "gate_weight" in name}
    assert any(name.endswith("linear_qkv.bias") for name in names), names
    assert any(name.endswith("shared_experts.gate_weight") for name in names), names


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(trained, alone: Callable[..., Run], layout: str) -> None:
    world_size, parallel = LAYOUTS[layout]
    raw = short(model=MODEL, moe=MOE, parallel=parallel)
    run = trained(world_size, raw)
    compare(run, alone(short(model=MODEL, moe=MOE)), FP32)
