"""The model assembled as a HybridModel is the model assembled as a GPTModel."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel.ranks import RankPools
from tests.parallel.training_runs import assemble, compare, settings, train

STEPS = 5
# Layouts: ranks and parallel settings.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "ep2": (2, {"expert_model_parallel_size": 2}),
    "tp2": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "pp2 vpp2": (
        2,
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    ),
}
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "uniform": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


@pytest.mark.parallel
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_hybrid_equals_gpt(ranks: RankPools, layout: str, recompute: str) -> None:
    world_size, parallel = LAYOUTS[layout]
    sections = {"parallel": parallel, "training": RECOMPUTE[recompute]}
    gpt = assemble(ranks(world_size).run(train, settings(**sections), STEPS))
    sections["model"] = {"implementation": "hybrid"}
    hybrid = assemble(ranks(world_size).run(train, settings(**sections), STEPS))
    compare(hybrid, gpt, 1e-12)
