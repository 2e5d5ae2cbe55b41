"""The same run twice, and what decides between equal scores and equal gates."""

import pytest

from tests.parallel.forced_routing import duplicate_router_rows
from tests.parallel.training_runs import (
    CP2,
    EP2,
    PP2,
    TP2,
    difference,
    short,
)

# Ranks, layout, layers and micro-batch size.
LAYOUTS = {
    "one process": (1, {}, 2, 2),
    "tp2 ep2": (2, {**TP2, **EP2}, 2, 2),
    "dp2 pp2 interleaved ep2": (4, {**PP2, **EP2, "virtual_pipeline_model_parallel_size": 2}, 4, 1),
    "cp2 ep4": (4, {**CP2, "expert_model_parallel_size": 4}, 2, 2),
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_repeated_runs_are_bitwise_equal(trained, layout, dtype):
    world_size, parallel, num_layers, micro_batch_size = LAYOUTS[layout]
    raw = short(
        model={"num_layers": num_layers},
        parallel=parallel,
        precision={"dtype": dtype},
        training={"deterministic": True, "micro_batch_size": micro_batch_size},
        moe={"input_jitter_eps": 0.1, "capacity_factor": 1.0},
    )
    first, second = (trained(world_size, raw) for _ in range(2))
    assert first.losses == second.losses
    assert first.grad_norms == second.grad_norms
    found = difference(second, first)
    assert found.gradient == found.selections == found.balance_loss == 0


def ties():
    """`_top_experts` against the definition, on scores with many equal values."""
    import torch

    from moepp_megatron.moe.selection import _top_experts

    generator = torch.Generator().manual_seed(1)
    for experts in (2, 5, 12, 40, 200):
        for topk in {1, 2, min(8, experts)}:
            scores = torch.randint(-2, 3, (300, experts), generator=generator) / 3
            scores[:100] = scores[:100].softmax(dim=-1)
            scores[200] = -0.0
            scores[200, ::2] = 0.0
            expected = scores.argsort(dim=-1, descending=True, stable=True)[:, :topk]
            assert torch.equal(_top_experts(scores, topk), expected), (experts, topk)


def test_between_equal_scores_the_first_expert_wins(ranks):
    ranks(1).run(ties)


@pytest.mark.parametrize(
    "parallel", [{**TP2, **EP2}, {**CP2, **EP2}, PP2], ids=["tp2 ep2", "cp2 ep2", "pp2"]
)
def test_ties_break_the_same_way_in_every_layout(trained, alone, parallel):
    """With router rows in equal pairs, every first pick of a pair of FFN experts is a tie."""
    moe = {"router_topk": 1}
    raw = short(moe=moe, parallel=parallel)
    run = trained(2, raw, 1, duplicate_router_rows)
    reference = alone(short(moe=moe), duplicate_router_rows, steps=1)
    assert difference(run, reference).selections < 1e-12
    for share in run.routing[0]["layer_expert_share"][:1]:
        # In the first MoE layer, whose logits are products with equal rows, exactly.
        assert share[1:8:2] == [0.0] * 4
        assert sum(share[0:8:2]) > 0
