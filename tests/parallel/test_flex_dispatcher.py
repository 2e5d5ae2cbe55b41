"""The flex dispatcher over stand-ins for its packages: what it trains equals one process."""

import pytest

from tests.parallel.flex_stand_ins import train_with_deepep, train_with_hybridep
from tests.parallel.forced_routing import (
    first_half_of_ffn_experts,
    one_ffn_expert,
    only_zero_experts,
)
from tests.parallel.training_runs import EP2, TP2, VANILLA, compare, short

FP32 = 1e-5


BACKENDS = {"deepep": train_with_deepep, "hybridep": train_with_hybridep}
FLEX = {"moe": {"dispatcher": "flex"}}
LAYOUTS = {
    "ep2": (2, EP2),
    "tp2 ep2 etp2": (4, {**TP2, **EP2, "expert_tensor_parallel_size": 2}),
    "tp2 ep4": (4, {**TP2, "expert_model_parallel_size": 4}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_training_equals_one_process(trained, alone, backend, layout):
    world_size, parallel = LAYOUTS[layout]
    raw = short(parallel=parallel, **FLEX)
    run = trained(world_size, raw, how=BACKENDS[backend])
    compare(run, alone(short()), FP32)


# Vanilla layers have megatron-core's own dispatcher.
@pytest.mark.parametrize("kind", [{}, VANILLA], ids=["MoE++", "vanilla"])
def test_bytes_are_those_of_one_vector_per_token_and_rank(trained, kind):
    """With one expert a rank no two selections share a vector: as many as the all-to-all sends."""
    moe = {**kind, "num_ffn_experts": 2}
    alltoall = trained(2, short(parallel=EP2, moe=moe), 1)
    raw = short(parallel=EP2, moe={**moe, "dispatcher": "flex"})
    for backend, train_with_flex in BACKENDS.items():
        flex = trained(2, raw, 1, how=train_with_flex)
        assert flex.routing[0]["a2a_bytes"] == alltoall.routing[0]["a2a_bytes"] > 0, backend
        compare(flex, alltoall, FP32)


# What each forces through the routers, and the FFN share that it leaves.
FORCED = {only_zero_experts: 0.0, one_ffn_expert: 0.5, first_half_of_ffn_experts: 1.0}


@pytest.mark.parametrize("prepare", FORCED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_and_experts_without_tokens(trained, alone, backend, prepare):
    """No FFN token at all; all of them on one expert; none for the second rank."""
    moe = {"num_zero_experts": 1 if prepare is one_ffn_expert else 2}
    raw = short(moe={**moe, "dispatcher": "flex"}, parallel=EP2)
    run = trained(2, raw, 1, prepare, how=BACKENDS[backend])
    assert run.routing[0]["ffn_fraction"] == FORCED[prepare]
    compare(run, alone(short(moe=moe), prepare, steps=1), FP32)


def metadata(routing_map, gates):
    """Indices, weights, gradient of the sum of weights, for F = 4 experts on 2 ranks, K = 2."""
    from types import SimpleNamespace

    import torch

    from moepp_megatron.moe.flex_dispatcher import _set_deepep_metadata

    manager = SimpleNamespace(num_experts=4, router_topk=2)
    probs = torch.tensor(gates, requires_grad=True)
    selected = torch.tensor(routing_map).view(-1, 2, 2)
    _set_deepep_metadata(manager, selected, probs.view(-1, 2, 2))
    manager.token_probs.sum().backward()
    return manager.token_indices.tolist(), manager.token_probs.tolist(), probs.grad.tolist()


def test_unused_slots_hold_the_sentinel(on_one_rank):
    routing_map = [[False] * 4, [False, True, False, False], [True, False, False, True]]
    gates = [[0.0] * 4, [0.0, 0.5, 0.0, 0.0], [0.25, 0.0, 0.0, 0.0]]
    indices, weights, gradient = on_one_rank(metadata, routing_map, gates)
    assert indices == [[-1, -1], [1, -1], [0, 3]]
    assert weights == [[0.0, 0.0], [0.5, 0.0], [0.25, 0.0]]
    # The last token's gate of expert 3 is 0 and selected: it still gets its gradient.
    assert gradient == [[0.0] * 4, [0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 1.0]]


def refusal(backend):
    from types import SimpleNamespace

    from moepp_megatron.moe.flex_dispatcher import FFNFlexTokenDispatcher

    with pytest.raises((ValueError, ImportError)) as caught:
        FFNFlexTokenDispatcher(1, [0], SimpleNamespace(moe_flex_dispatcher_backend=backend))
    return str(caught.value)


def test_nccl_ep_is_refused(on_one_rank):
    message = on_one_rank(refusal, "ncclep")
    assert message.startswith("moe_flex_dispatcher_backend (ncclep) must be deepep or hybridep")
