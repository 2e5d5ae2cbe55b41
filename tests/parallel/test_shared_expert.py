"""A shared expert runs while other experts' rows travel: neither reads the other's."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.parallel.layer_runs import evaluate_layer
from tests.parallel.ranks import RankPools
from tests.parallel.training_runs import Run, compare, short

# fp32 sums in another order: a few units in the last place (6e-8) of the largest summand.
RELATIVE = 1e-5

SHARED = {"num_ffn_experts": 8, "shared_expert_ffn_hidden_size": 16}
# megatron-core's layer, which runs the shared expert before it gathers.
VANILLA = {
    **SHARED,
    **dict.fromkeys(("num_zero_experts", "num_copy_experts", "num_constant_experts"), 0),
    "gating_residual": False,
}


def layout(tp: int, ep: int) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": tp,
        "sequence_parallel": tp > 1,
        "expert_model_parallel_size": ep,
    }


@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall", "alltoall_dedup"])
@pytest.mark.parametrize(("world", "tp", "ep"), [(2, 2, 2), (4, 2, 4)])
def test_training_is_that_of_one_process(trained, alone, world, tp, ep, dispatcher):
    raw = short(moe={**SHARED, "dispatcher": dispatcher}, parallel=layout(tp, ep))
    run = trained(world, raw)
    # On one process nothing travels, whatever the dispatcher.
    compare(run, alone(short(moe=SHARED)), RELATIVE)


def test_vanilla_training_is_that_of_one_process(trained, alone: Callable[..., Run]) -> None:
    moe = {**VANILLA, "dispatcher": "allgather"}
    raw = short(moe=moe, parallel=layout(2, 2))
    run = trained(2, raw)
    compare(run, alone(short(moe=moe)), RELATIVE)


@pytest.mark.parametrize("kind", ["moepp", "vanilla"])
def test_evaluation_reads_its_own_tokens(ranks: RankPools, kind: str) -> None:
    """Without autograd, on ranks whose tokens are of two data-parallel shares."""
    moe = SHARED if kind == "moepp" else VANILLA
    gathered, exchanged = (
        ranks(4).run(evaluate_layer, short(moe={**moe, "dispatcher": name}, parallel=layout(2, 4)))
        for name in ("allgather", "alltoall")
    )
    for actual, expected in zip(gathered, exchanged, strict=True):
        atol = RELATIVE * np.abs(expected).max()
        np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)
