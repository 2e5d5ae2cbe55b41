"""A shared expert runs while other experts' rows travel: neither reads the other's."""

import numpy as np
import pytest

from tests.parallel.layer_runs import evaluate_layer
from tests.parallel.training_runs import TP2, VANILLA, short

# fp32 sums in another order: a few units in the last place (6e-8) of the largest summand.
RELATIVE = 1e-5

SHARED = {"num_ffn_experts": 8, "shared_expert_ffn_hidden_size": 16}
# Two data-parallel shares of two tensor-parallel ranks.
PARALLEL = TP2 | {"expert_model_parallel_size": 4}


@pytest.mark.parametrize("kind", ["moepp", "vanilla"])
def test_evaluation_reads_its_own_tokens(ranks, kind):
    """Without autograd, on ranks whose tokens are of two data-parallel shares."""
    # megatron-core's layer runs the shared expert before it gathers.
    moe = SHARED if kind == "moepp" else VANILLA | SHARED
    gathered, exchanged = (
        ranks(4).run(evaluate_layer, short(moe={**moe, "dispatcher": name}, parallel=PARALLEL))
        for name in ("allgather", "alltoall")
    )
    for actual, expected in zip(gathered, exchanged, strict=True):
        atol = RELATIVE * np.abs(expected).max()
        np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)
