"""MoE++ in Megatron-LM's own loop trains to the result of our trainer on one process."""

from __future__ import annotations

import pytest

from tests.parallel.megatron_lm_runs import SETTINGS, STEPS, train_in_megatron_lm
from tests.parallel.ranks import RankPools
from tests.parallel.training_runs import Run, assemble, compare, train

# fp32; the same bound as in the layout matrix, whose largest difference is 2.3e-6.
RELATIVE = 1e-5


@pytest.fixture(scope="module")
def reference(ranks: RankPools) -> Run:
    return assemble(ranks(1).run(train, SETTINGS, STEPS))


@pytest.mark.parallel
@pytest.mark.parametrize(
    ("way", "arguments"),
    [
        pytest.param("config", "--expert-model-parallel-size 2", id="config, ep 2"),
        pytest.param("spec", "--expert-model-parallel-size 2 ", id="spec, ep 2"),
        pytest.param(
            "config", "--tensor-model-parallel-size 2 --sequence-parallel", id="config, tp 2"
        ),
        pytest.param("config", "--context-parallel-size 2", id="config, cp 2"),
        pytest.param("provider", "--pipeline-model-parallel-size 2", id="provider, pp 2"),
        pytest.param(
            "config",
            "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
            id="config, pp 2, vpp 2",
        ),
    ],
)
def test_equals_our_trainer(ranks: RankPools, reference: Run, way: str, arguments: str) -> None:
    if way == "spec":
        arguments += " --spec moepp_megatron.interop.megatron_lm moepp_spec"
    results = ranks(2).run(train_in_megatron_lm, arguments, way)
    compare(assemble(results), reference, RELATIVE)
