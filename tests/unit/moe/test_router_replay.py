"""megatron-core's `RouterReplay` drives MoE++ routers as it drives megatron-core's own."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.replay import checked_routes
from tests.parallel.training_runs import FULL, SELECTIVE
from tests.unit.moe.builders import (
    SEQUENCE,
    VOCAB,
    build_layer,
    build_model,
    randomize,
    tested_version_only,
    token_losses,
)

RECORD, FORWARD, BACKWARD = RouterReplayAction
RECOMPUTES = {
    "kept": {},
    "layers again": FULL,
    "moe again": SELECTIVE,
}
SETTINGS = {
    "plain": {},
    "no residual": {"gating_residual": False},
    "released code": {"gate_normalization": "nonzero", "two_layer_gate": True},
    "capacity": {"capacity_factor": 0.7},
    "groups": {"num_groups": 2, "group_topk": 1},
    "selection bias": {"selection_bias": True, "gate_normalization": "selected"},
}
BATCHES = 2


@pytest.fixture(autouse=True)
def _no_other_routers():
    """The list of routers is of the process."""
    RouterReplay.clear_global_router_replay_instances()
    yield
    RouterReplay.clear_global_router_replay_instances()


def batches():
    generator = torch.Generator().manual_seed(11)
    return torch.randint(VOCAB, (BATCHES, 2, SEQUENCE + 1), generator=generator)


def model_of(setting="plain", recompute="kept", seed=5):
    moepp = MoEPPConfig(4, balance_coeff=0.1, **SETTINGS[setting])
    RouterReplay.clear_global_router_replay_instances()
    model = build_model(moepp, moe_enable_routing_replay=True, **RECOMPUTES[recompute])
    torch.manual_seed(seed)
    randomize(model, std=0.3)
    return model


def train(model, routes):
    """Losses, gradients and routes of two micro-batches, as loops of reinforcement learning run.

    All forward passes come before all backward passes, as where a pipeline fills.
    """
    RouterReplay.clear_global_indices()
    model.zero_grad()
    losses, recorded = [], []
    for index, tokens in enumerate(batches()):
        RouterReplay.set_global_router_replay_action(RECORD if routes is None else FORWARD)
        if routes is not None:
            RouterReplay.set_replay_data(routes[index])
        losses.append(token_losses(model, tokens))
        recorded.append([] if routes is not None else RouterReplay.get_recorded_data())
    if routes is not None:
        RouterReplay.set_global_router_replay_action(BACKWARD)
    for loss in losses:
        loss.float().sum().backward()
    RouterReplay.clear_global_router_replay_action()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return torch.stack(losses).detach(), gradients, recorded


def assert_same(found, expected):
    assert torch.equal(found[0], expected[0])
    for name, gradient in expected[1].items():
        assert torch.equal(found[1][name], gradient), name


@pytest.mark.parametrize("recompute", RECOMPUTES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_replayed_routes_give_the_recorded_step(setting, recompute):
    model = model_of(setting, recompute)
    expected = train(model, None)
    # Selections of another model would follow from these; only the given ones may count.
    assert_same(train(model, expected[2]), expected)
    # int32 and on the CPU, as engines return them.
    assert_same(train(model, [[r.int() for r in layers] for layers in expected[2]]), expected)


def test_recording_changes_nothing_and_holds_every_kind_of_expert():
    model = model_of()
    losses, gradients, recorded = train(model, None)
    RouterReplay.clear_global_router_replay_action()
    model.zero_grad()
    plain = torch.stack([token_losses(model, tokens) for tokens in batches()])
    assert torch.equal(plain.detach(), losses)
    routes = torch.stack([torch.stack(layers) for layers in recorded])
    assert routes.shape == (BATCHES, 3, 2 * SEQUENCE, 2)
    assert routes.unique().tolist() == list(range(model.moepp.num_experts))


@pytest.mark.parametrize("recompute", RECOMPUTES)
def test_gates_are_those_of_the_live_logits(recompute):
    """Routes of another model: another loss than its own and a gradient of every router."""
    routes = train(model_of(), None)[2]
    model = model_of(recompute=recompute, seed=6)
    own = train(model, None)
    losses, gradients, _ = train(model, routes)
    assert not torch.equal(losses, own[0])
    for name, gradient in gradients.items():
        if ".router." in name:
            assert gradient.abs().max() > 0, name
            assert not torch.equal(gradient, own[1][name]), name


def test_the_map_is_the_given_one_and_padding_stays_out():
    """Replayed experts count in statistics; those of padding are not selected."""
    moepp = MoEPPConfig(4)
    layer = build_layer(moepp, moe_enable_routing_replay=True)
    assert layer.router.router_replay.layer_number == 2
    tokens, previous = torch.randn(3, 1, 16), torch.randn(3, 1, moepp.num_experts)
    RouterReplay.set_replay_data([torch.tensor([[0, 1], [5, 4], [3, 2]])])
    RouterReplay.set_global_router_replay_action(FORWARD)
    layer(tokens, previous, torch.tensor([[False, False, True]]))
    assert layer.statistics.selected.tolist() == [1, 1, 0, 0, 1, 1, 0, 0]


def test_routes_of_other_tokens_are_refused():
    model = model_of()
    routes = train(model, None)[2]
    with pytest.raises(ValueError, match=r"replayed routes \[23, 2\] must be \[24, 2\]"):
        train(model, [[layer[1:] for layer in layers] for layers in routes])


def test_an_object_of_a_loop_may_take_its_place():
    """As loops put their own class into `router_replay`; only `get_replay_topk` is called."""

    class Own:
        def get_replay_topk(self, scores, topk, num_groups, group_topk, compute):  # type: ignore[no-untyped-def]
            _, live = compute(scores, topk, num_groups=num_groups, group_topk=group_topk)
            return scores.gather(1, live), torch.full_like(live, 7) - torch.arange(topk)

    layer = build_layer(MoEPPConfig(4))
    layer.router.router_replay = Own()
    layer(torch.randn(3, 1, 16), torch.randn(3, 1, 8))
    assert layer.statistics.selected.tolist() == [0] * 6 + [3, 3]


@tested_version_only
def test_a_captured_router_is_refused():
    changes = {"cuda_graph_impl": "local", "cuda_graph_modules": ["moe_router"]}
    with pytest.raises(ValueError, match="moe_enable_routing_replay"):
        build_layer(MoEPPConfig(4), moe_enable_routing_replay=True, **changes)


# Two tokens, two MoE layers behind a dense one, K = 2; experts 4 and 5 are no FFN.
LAYER = MoEPPConfig(4, num_constant_experts=0)
PATTERN = [False, True, True]
GOOD = np.array([[[0, 5], [1, 4]], [[2, 3], [3, 0]]], dtype=np.int32)


def test_forms_of_engines():
    """Sequences apart, unsigned bytes, and a layer axis that counts dense layers too."""
    every_layer = np.concatenate([np.zeros_like(GOOD[:, :1]), GOOD], axis=1)
    for routes in (GOOD[:, None], GOOD[None], GOOD.astype(np.uint8), every_layer):
        np.testing.assert_array_equal(checked_routes(routes, 2, PATTERN, LAYER), GOOD)


def test_own_routes_may_be_of_ffn_experts_only():
    routes = np.array([[[0, 1], [1, 0]], [[2, 3], [3, 0]]])
    found = checked_routes(routes, 2, PATTERN, LAYER, is_own=True)
    np.testing.assert_array_equal(found, routes)


def test_a_dropped_number_is_that_of_the_one_expert():
    one = MoEPPConfig(4, num_constant_experts=0, num_copy_experts=0)
    dropped, expected = np.where(GOOD >= 4, -1, GOOD), np.where(GOOD >= 4, 4, GOOD)
    np.testing.assert_array_equal(checked_routes(dropped, 2, PATTERN, one), expected)
    wide = replace(one, num_ffn_experts=128)
    found = checked_routes(dropped.astype(np.int8), 2, PATTERN, wide)
    np.testing.assert_array_equal(found, np.where(GOOD >= 4, 128, GOOD))
    with pytest.raises(ValueError, match=r"\(expert -1\) must name experts 0 to 5"):
        checked_routes(dropped, 2, PATTERN, LAYER)


@pytest.mark.parametrize(
    ("routes", "message"),
    [
        (GOOD[:1], r"\[1, 2, 2\]\) must be \[2 tokens, 2 MoE layers, 2\]"),
        (GOOD[:, :1], "2 MoE layers"),
        (GOOD[0], "2 MoE layers"),
        (GOOD.astype(float), "float64.*whole numbers"),
        (GOOD + 1, "expert 6.*experts 0 to 5"),
        # vLLM's ZeroExpertRouter writes 0 for each of them before routes are captured.
        (np.where(GOOD == 5, 0, GOOD), "one expert twice.*name 2 experts"),
        (np.array([[[0, 1], [1, 0]], [[2, 3], [3, 0]]]), "FFN experts only.*too"),
    ],
)
def test_routes_that_cannot_be_repeated(routes, message):
    with pytest.raises(ValueError, match=message):
        checked_routes(routes, 2, PATTERN, LAYER)
