"""Gradients of weights that the combined schedule leaves for later equal those computed at once.

The same products of the same operands are added up in the same order, so they are equal to the bit.
"""

import pytest

from moepp_megatron.training.setup import _compile_extension
from tests.parallel.training_runs import EP2, LATENT_WIDTHS, assemble, compare, settings
from tests.te_stand_in.rank_runs import train_in_nodes

STAGES = {**EP2, "pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
SHARED = {"layer_freq": [0, 1, 0, 1], "shared_expert_ffn_hidden_size": 16}
OVERLAPPED = {**EP2, "overlap_grad_reduce": True, "overlap_param_gather": True}
# Ranks, settings, and products with weights of one layer, a rank's two stages or its four layers.
CASES = {
    "dense layers, shared experts": (2, {"moe": SHARED}, 2 * 4 + 2 * 6),
    "gradients reduced, parameters gathered meanwhile": (2, {"parallel": OVERLAPPED}, 4 * 4),
    "latent attention": (
        2,
        {"model": {"latent_attention": LATENT_WIDTHS, "num_query_groups": None}},
        4 * 7,
    ),
    "moe_act recomputed": (
        2,
        {"training": {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}},
        4 * 4,
    ),
    "interleaved pipeline": (4, {"parallel": STAGES}, 2 * 4),
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_same(ranks, case):
    world, sections, products = CASES[case]
    if case == "moe_act recomputed":
        # Here: it computes for 20 seconds, for which ranks should not wait.
        _compile_extension()
    runs, counts = [], []
    for delays in (False, True):
        parallel = {
            **EP2,
            **sections.get("parallel", {}),
            "overlap_moe_expert_parallel_comm": True,
            "delay_wgrad_compute": delays,
        }
        training = {"micro_batch_size": 1, **sections.get("training", {})}
        own = {**sections, "parallel": parallel, "training": training}
        raw = settings(**own, precision={"dtype": "bf16"})
        results = ranks(world).run(train_in_nodes, raw, 2)
        runs.append(assemble([run for run, _ in results]))
        counts.append(results[0][1])
    compare(runs[1], runs[0], 0.0)
    # megatron-core's wrappers ask Transformer Engine only where they delay. Two steps of 8
    # sequences, which the data-parallel ranks share out.
    micro_batches = 8 // (world // STAGES["pipeline_model_parallel_size"] if world == 4 else world)
    assert counts == [0, 2 * micro_batches * products]
