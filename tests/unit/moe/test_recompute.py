"""Activation recomputation with the lane: the same bits, everything counted once."""

import functools

import pytest
import torch

from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.layer import moe_statistics
from tests.parallel.training_runs import FULL, SELECTIVE
from tests.unit.moe.builders import SEQUENCE, VOCAB, build_model, randomize, token_losses

RECOMPUTES = {
    "selective moe": SELECTIVE,
    "uniform 1": FULL,
    "uniform 2": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 2,
    },
    "block 2": {
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": 2,
    },
}
SETTINGS = {
    "plain": ({}, {}),
    "released code": (
        {"gate_normalization": "nonzero", "expert_input_scale": 2.0, "two_layer_gate": True},
        {},
    ),
    "capacity": ({"capacity_factor": 0.7, "balance_scope": "sequence"}, {}),
    "global balance": ({"balance_scope": "global"}, {}),
    "no residual": ({"gating_residual": False}, {}),
    "z-loss and jitter": ({}, {"moe_z_loss_coeff": 0.1, "moe_input_jitter_eps": 0.1}),
    "dense first": ({}, {"moe_layer_freq": [0, 1, 0, 1]}),
    "bf16": ({}, {"params_dtype": torch.bfloat16, "bf16": True}),
    "padding": ({}, {}),
}


def micro_batches(count):
    generator = torch.Generator().manual_seed(11)
    return torch.randint(VOCAB, (count, 2, SEQUENCE + 1), generator=generator)


def make_model(setting="plain", recompute=None):
    moepp_changes, megatron_changes = SETTINGS[setting]
    moepp = MoEPPConfig(4, balance_coeff=0.1, **moepp_changes)
    changes = megatron_changes | (RECOMPUTES[recompute] if recompute else {})
    model = build_model(moepp, num_layers=4, **changes)
    torch.manual_seed(5)
    randomize(model, std=0.1)
    return model


def train_step(model, batches, setting="plain"):
    """Losses, gradients and statistics of one step of gradient accumulation."""
    torch.manual_seed(17)
    losses = []
    for tokens in batches:
        padding = tokens[:, :-1] % 3 == 0 if setting == "padding" else None
        loss = token_losses(model, tokens, padding_mask=padding)
        loss.float().sum().backward()
        losses.append(loss.detach())
    gradients = {name: p.grad for name, p in model.named_parameters()}
    statistics = {number: s.as_vector() for number, s in moe_statistics(model).items()}
    return torch.stack(losses), gradients, statistics


@functools.cache
def without(setting):
    """A step of the model that keeps everything."""
    return train_step(make_model(setting), micro_batches(2), setting)


@pytest.mark.parametrize("recompute", RECOMPUTES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_same_bits_as_without(setting, recompute):
    losses, gradients, statistics = without(setting)
    again = train_step(make_model(setting, recompute), micro_batches(2), setting)
    losses_again, gradients_again, statistics_again = again
    assert torch.equal(losses, losses_again)
    assert gradients.keys() == gradients_again.keys()
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert torch.equal(gradient, gradients_again[name]), name
    assert statistics.keys() == statistics_again.keys()
    for number, vector in statistics.items():
        assert torch.equal(vector, statistics_again[number]), number


@pytest.mark.parametrize("recompute", RECOMPUTES)
def test_layers_do_run_twice(recompute):
    # Otherwise the test above would compare a run with itself.
    model = make_model(recompute=recompute)
    calls = []
    model.decoder.layers[1].mlp.router.register_forward_hook(
        lambda *_: calls.append(torch.is_grad_enabled())
    )
    train_step(model, micro_batches(1))
    assert calls == [False, True]


@pytest.mark.parametrize("recompute", [None, *RECOMPUTES])
def test_three_micro_batches_count_three_times(recompute):
    moepp = make_model().moepp
    batches = micro_batches(3)
    single = [train_step(make_model(recompute=recompute), [batch])[2] for batch in batches]
    model = make_model(recompute=recompute)
    _, _, together = train_step(model, batches)
    tokens = 3 * 2 * SEQUENCE
    for number, statistics in moe_statistics(model).items():
        assert statistics.num_tokens == tokens
        assert statistics.selected.sum() == moepp.router_topk * tokens
        # Counts are exact; the balance loss is a sum of three fp32 numbers.
        expected = sum(vectors[number] for vectors in single)
        assert torch.equal(together[number][: moepp.num_experts], expected[: moepp.num_experts])
        assert torch.allclose(together[number], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("recompute", [None, *RECOMPUTES])
def test_evaluation_counts_nothing(recompute):
    model = make_model(recompute=recompute)
    (tokens,) = micro_batches(1)
    with torch.no_grad():
        token_losses(model, tokens)
    model.eval()
    token_losses(model, tokens)
    with torch.no_grad():
        token_losses(model, tokens)
    for statistics in moe_statistics(model).values():
        assert not statistics.as_vector().any()


def test_reset_forgets():
    model = make_model("capacity")
    train_step(model, micro_batches(1))
    for statistics in moe_statistics(model).values():
        assert statistics.as_vector()[-4] > 0  # dropped by the capacity limit
        statistics.reset()
        assert not statistics.as_vector().any()
