"""Two expert-parallel ranks: FP8 adds rows to GEMMs, and not a byte to what travels."""

import numpy as np
import pytest

from tests.te_stand_in.models import config_of
from tests.te_stand_in.rank_runs import dispatch, starved, uneven
from tests.unit.moe.test_layer_against_reference import DISPATCHERS

RANKS, FFN = 2, 4


def raw_config(recipe, dispatcher):
    config = config_of(
        recipe,
        moe={"dispatcher": dispatcher},
        parallel={"expert_model_parallel_size": RANKS},
        training={"train_iters": 10, "global_batch_size": 4, "micro_batch_size": 2},
    )
    return config.model_dump(mode="json", exclude_unset=True)


@pytest.mark.parametrize("draw", [uneven, starved])
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_padding_does_not_travel(ranks, dispatcher, draw):
    pool = ranks(RANKS)
    plain = pool.run(dispatch, raw_config(None, dispatcher), draw, False)
    fp8 = pool.run(dispatch, raw_config("blockwise", dispatcher), draw, True)
    of_experts = sum(result["map"].sum(axis=0) for result in plain)
    assert (draw is starved) == (of_experts[FFN // RANKS :].sum() == 0)
    for rank in range(RANKS):
        for what in ("vectors", "metadata", "counted"):
            assert fp8[rank][what] == plain[rank][what], what
        own = of_experts[rank * FFN // RANKS : (rank + 1) * FFN // RANKS]
        assert plain[rank]["rows"] == [tuple(own)] * 2
        assert fp8[rank]["rows"] == [tuple(np.ceil(own / 16).astype(int) * 16)] * 2
    assert (plain[0]["counted"] > 0) == (draw is uneven or dispatcher == "allgather")
