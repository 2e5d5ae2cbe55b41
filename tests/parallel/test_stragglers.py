"""The rank that is slow by itself is named, though every rank's step takes as long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moepp_megatron.observe.metrics import StepMetrics, read_metrics
from tests.parallel.ranks import RankPools
from tests.parallel.resilience_runs import Fault, run_trainer, trainer_settings

pytestmark = pytest.mark.parallel

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "ep2": (2, {"expert_model_parallel_size": 2}),
    "tp2": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "dp3": (3, {}),
}


def _train(ranks: RankPools, folder: Path, layout: str, *faults: Fault) -> list[StepMetrics]:
    world_size, parallel = LAYOUTS[layout]
    watch = {"straggler_interval": 3, "straggler_threshold": 2.0}
    # One forward pass a rank and step, two where all ranks see all sequences: each is slept in.
    batch = 3 if world_size == 3 else 2
    training = {"train_iters": 6, "global_batch_size": batch, "micro_batch_size": 1}
    raw = trainer_settings(folder, parallel=parallel, training=training, resilience=watch)
    ranks(world_size).run(run_trainer, raw, (), faults)
    return read_metrics(folder / "metrics.jsonl")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_slow_rank_is_named(ranks: RankPools, tmp_path: Path, layout: str) -> None:
    """Rank 1 sleeps half a second in each forward pass: far more than everything else together."""
    records = _train(ranks, tmp_path, layout, Fault("slow", 1))
    assert [record.slowest_rank for record in records] == [None, None, 1, None, None, 1]
    for record in records[2::3]:
        assert record.slowest_rank_ratio is not None
        assert record.slowest_rank_ratio > 2.0
        assert record.waiting_fraction is not None
        assert 0.2 < record.waiting_fraction < 1.0
