"""What the planner says a CPU rank takes, against every tensor that training steps allocate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.parallel.ranks import RankPools
from tests.parallel.training_runs import join

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SMALL = ("model.num_layers=2", "training.global_batch_size=4", "training.micro_batch_size=4")
CASES = {
    "quickstart": (1, ()),
    "all recomputed": (
        1,
        (
            "training.recompute_granularity=full",
            "training.recompute_method=uniform",
            "training.recompute_num_layers=1",
        ),
    ),
    "pipeline, two groups": (
        2,
        (
            "parallel.pipeline_model_parallel_size=2",
            "model.num_query_groups=2",
            "training.micro_batch_size=2",
        ),
    ),
}


def estimated_and_measured(settings: list[str]) -> tuple[float, int]:
    """Bytes of this rank at its peak."""
    import torch.distributed as dist

    from benchmarks.tensor_bytes import live_bytes, tensor_bytes
    from moepp_megatron.config import load_config
    from moepp_megatron.workbench.bench.step import Stepper
    from moepp_megatron.workbench.planning.memory import rank_memory

    config = load_config(QUICKSTART, settings)
    layout = join(config)
    # What earlier tests of these ranks have left.
    others = live_bytes()

    def prepare() -> Callable[[], None]:
        stepper = Stepper(config, layout)
        stepper.step()
        return stepper.step

    said = rank_memory(config, layout, layout.coordinates(dist.get_rank()).pp, "local")
    return said.total, tensor_bytes(prepare).peak - others


@pytest.mark.parametrize("case", CASES)
def test_estimate_is_what_tensors_take(ranks: RankPools, case: str) -> None:
    number, settings = CASES[case]
    all_settings = ["run.dir=unused", "parallel.expert_model_parallel_size=1", *SMALL, *settings]
    for estimated, measured in ranks(number).run(estimated_and_measured, all_settings):
        assert estimated == pytest.approx(measured, rel=0.1)
