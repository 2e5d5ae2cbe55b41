"""The rank that is slow by itself is named, though every rank's step takes as long."""

import pytest

from moepp_megatron.observe.metrics import read_metrics
from tests.parallel.resilience_runs import Fault, run_trainer, trainer_settings
from tests.parallel.training_runs import EP2, PP2, TP2

pytestmark = pytest.mark.parallel

# Ranks, layout, and sequences: so many that each rank has one forward pass in a step.
LAYOUTS = {
    "ep2": (2, EP2, 2),
    "tp2": (2, TP2, 1),
    "pp2": (2, PP2, 1),
    # Not as many ranks above the middle as below.
    "dp3": (3, {}, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_slow_rank_is_named(ranks, tmp_path, layout):
    """Rank 1 sleeps in each forward pass: far longer than everything else together takes."""
    world_size, parallel, batch = LAYOUTS[layout]
    raw = trainer_settings(
        tmp_path,
        parallel=parallel,
        training={"train_iters": 4, "global_batch_size": batch, "micro_batch_size": 1},
        resilience={"straggler_interval": 2, "straggler_threshold": 2.0},
    )
    ranks(world_size).run(run_trainer, raw, (), (Fault("slow", 1),))
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record.slowest_rank for record in records] == [None, 1, None, 1]
    for record in records[1::2]:
        assert record.slowest_rank_ratio > 2.0
        assert 0.2 < record.waiting_fraction < 1.0
