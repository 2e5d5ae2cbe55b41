"""The flex dispatcher against stand-ins for DeepEP's two fused functions, which need GPUs.

The stand-ins do what DeepEP documents: a token goes once to every rank that holds one of its
experts, -1 marks a slot without expert, and combining adds up what comes back.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel.forced_routing import only_zero_experts
from tests.parallel.ranks import RankPools
from tests.parallel.training_runs import assemble, compare, settings, train

FP32 = 1e-5


def fused_dispatch(
    x: Any, token_indices: Any, token_probs: Any, num_experts: int, group: Any, **kwargs: Any
) -> tuple[Any, ...]:
    """DeepEP's dispatch, by gathering everything and keeping what is for this rank."""
    import torch
    import torch.distributed as dist
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    assert token_indices.dtype is torch.int64
    assert token_probs.dtype is torch.float32
    local = num_experts // group.size()
    all_x = gather_from_sequence_parallel_region(x, group=group)
    all_probs = gather_from_sequence_parallel_region(token_probs, group=group)
    all_indices = token_indices.new_empty(all_x.shape[0], token_indices.shape[1])
    dist.all_gather_into_tensor(all_indices, token_indices.contiguous(), group=group)
    is_mine = all_indices // local == group.rank()
    rows = is_mine.any(dim=1).nonzero().squeeze(1)
    is_mine = is_mine[rows]
    indices = torch.where(is_mine, all_indices[rows] % local, -1)
    probs = torch.where(is_mine, all_probs[rows], 0.0)
    counts = torch.stack([(indices == expert).sum() for expert in range(local)])
    return all_x[rows], indices, probs, counts, (rows, all_x.shape[0])


def fused_combine(x: Any, group: Any, handle: Any, **kwargs: Any) -> tuple[Any, None]:
    """DeepEP's combine: every token's results from all ranks, added up on its own rank."""
    from megatron.core.tensor_parallel.mappings import reduce_scatter_to_sequence_parallel_region

    rows, total = handle
    whole = x.new_zeros(total, x.shape[1]).index_add(0, rows, x)
    return reduce_scatter_to_sequence_parallel_region(whole, group=group), None


def train_with_stand_ins(*args: Any) -> Any:
    from megatron.core.transformer.moe import token_dispatcher

    stand_ins = {
        "fused_dispatch": fused_dispatch,
        "fused_combine": fused_combine,
        "set_deepep_num_sms": lambda number: None,
    }
    before = {name: getattr(token_dispatcher, name) for name in stand_ins}
    try:
        for name, function in stand_ins.items():
            setattr(token_dispatcher, name, function)
        return train(*args)
    finally:
        for name, function in before.items():
            setattr(token_dispatcher, name, function)


FLEX = {"moe": {"dispatcher": "flex"}}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ep2": (2, {"expert_model_parallel_size": 2}),
    "ep2 etp2": (4, {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2}),
    "tp2 ep4": (
        4,
        {
            "expert_model_parallel_size": 4,
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
        },
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_equals_one_process(ranks: RankPools, layout: str) -> None:
    world_size, parallel = LAYOUTS[layout]
    reference = assemble(ranks(1).run(train, settings(), 3))
    run = assemble(
        ranks(world_size).run(train_with_stand_ins, settings(parallel=parallel, **FLEX), 3)
    )
    compare(run, reference, FP32)


def test_bytes_are_those_of_one_vector_per_token_and_rank(ranks: RankPools) -> None:
    """With one expert a rank no two selections share a vector: as many as the all-to-all sends."""
    parallel = {"expert_model_parallel_size": 2}
    moe = {"num_ffn_experts": 2}
    alltoall = assemble(ranks(2).run(train, settings(parallel=parallel, moe=moe), 1))
    flex_moe = {**moe, "dispatcher": "flex"}
    raw = settings(parallel=parallel, moe=flex_moe)
    flex = assemble(ranks(2).run(train_with_stand_ins, raw, 1))
    assert flex.routing[0]["a2a_bytes"] == alltoall.routing[0]["a2a_bytes"] > 0


def test_no_ffn_token_at_all(ranks: RankPools) -> None:
    moe = {"num_zero_experts": 2}
    reference = assemble(ranks(1).run(train, settings(moe=moe), 2, only_zero_experts))
    raw = settings(moe={**moe, "dispatcher": "flex"}, parallel={"expert_model_parallel_size": 2})
    run = assemble(ranks(2).run(train_with_stand_ins, raw, 2, only_zero_experts))
    assert run.routing[0]["ffn_fraction"] == 0
    compare(run, reference, FP32)


def metadata(routing_map: list[list[bool]], gates: list[list[float]]) -> tuple[Any, Any, Any]:
    """Indices, weights, gradient of the sum of weights, for F = 4 experts on 2 ranks, K = 2."""
    import torch

    from moepp_megatron.moe.flex_dispatcher import FFNDeepepManager

    manager = FFNDeepepManager.__new__(FFNDeepepManager)
    manager.num_experts, manager.router_topk = 4, 2
    probs = torch.tensor(gates, requires_grad=True)
    manager.setup_metadata(torch.tensor(routing_map).view(-1, 2, 2), probs.view(-1, 2, 2))
    manager.token_probs.sum().backward()
    return manager.token_indices.tolist(), manager.token_probs.tolist(), probs.grad.tolist()


def test_unused_slots_hold_the_sentinel(ranks: RankPools) -> None:
    routing_map = [[False] * 4, [False, True, False, False], [True, False, False, True]]
    gates = [[0.0] * 4, [0.0, 0.5, 0.0, 0.0], [0.25, 0.0, 0.0, 0.0]]
    ((indices, weights, gradient),) = ranks(1).run(metadata, routing_map, gates)
    assert indices == [[-1, -1], [1, -1], [0, 3]]
    assert weights == [[0.0, 0.0], [0.5, 0.0], [0.25, 0.0]]
    # The last token's gate of expert 3 is 0 and selected: it still gets its gradient.
    assert gradient == [[0.0] * 4, [0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 1.0]]


def refusal(backend: str) -> str:
    from types import SimpleNamespace

    from moepp_megatron.moe.flex_dispatcher import FFNFlexTokenDispatcher

    with pytest.raises((ValueError, ImportError)) as caught:
        FFNFlexTokenDispatcher(1, [0], SimpleNamespace(moe_flex_dispatcher_backend=backend))
    return str(caught.value)


def test_nccl_ep_is_refused(ranks: RankPools) -> None:
    (message,) = ranks(1).run(refusal, "ncclep")
    assert message.startswith("moe_flex_dispatcher_backend (ncclep) must be deepep or hybridep")
