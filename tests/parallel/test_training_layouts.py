"""Training in parallel layouts equals training on one process."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel.ranks import RankPools
from tests.parallel.training_runs import assemble, compare, settings, train

# fp32 sums are added in another order on another layout: a few units in the last place (6e-8) a
# sum, which ten steps of Adam carry on.
FP32 = 1e-5

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ep2": (2, {"expert_model_parallel_size": 2}),
    "tp2": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "dp2": (2, {"use_distributed_optimizer": False}),
    "dp2 distributed optimizer": (2, {}),
}


@pytest.mark.parallel
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ten_steps_equal_one_process(ranks: RankPools, layout: str) -> None:
    world_size, parallel = LAYOUTS[layout]
    reference = assemble(ranks(1).run(train, settings(), 10))
    run = assemble(ranks(world_size).run(train, settings(parallel=parallel), 10))
    compare(run, reference, FP32)
