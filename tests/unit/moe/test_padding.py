"""Padding masks: a padded token is as if it were not there, but for a row of zeros."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import CudaGraphModule

from moepp_megatron.experts import FFN_ONLY
from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.layer import VanillaMoELayer
from tests.parallel.training_runs import SELECTIVE
from tests.unit.moe.builders import (
    HIDDEN,
    assert_close,
    build_layer,
    build_transformer_layer,
    reference_of,
)
from tests.unit.moe.test_kernels import compiled
from tests.unit.moe.test_layer_against_reference import inputs, run_both

__all__ = ["compiled"]  # A fixture.

LENGTH, BATCH = 8, 4


def mask():
    """[b, s] with uneven padding: at the end, in the middle, everywhere, nowhere."""
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[0, 5:] = True
    padding[1, 2:4] = True
    padding[2] = True
    return padding


def check_layer(layer):
    """Output, logits, every gradient and all counts are the reference's, whatever padding holds."""
    padding = mask()
    hidden, previous = inputs(layer.moepp, LENGTH, BATCH)
    hidden[padding.T], previous[padding.T] = 1e4, 1e4
    run = run_both(layer, hidden, previous, padding=padding)
    run.check()
    of_padding = (run.hidden, run.logits, *(grad for grad, _ in run.input_grads.values()))
    assert not any(tensor[padding.T].any() for tensor in of_padding)
    assert layer.moepp.capacity_factor is None or layer.statistics.dropped > 0


LAYERS = {
    "paper": ({}, "alltoall", {}),
    "released": (
        {"gate_normalization": "nonzero", "expert_input_scale": 2.0},
        "alltoall_dedup",
        {},
    ),
    "sequence": ({"balance_scope": "sequence", "score_function": "sigmoid"}, "allgather", {}),
    "global": (
        {"balance_scope": "global", "gate_normalization": "selected"},
        "alltoall",
        {"calculate_per_token_loss": False},
    ),
    "capacity": ({"capacity_factor": 0.6, "logits_norm_std": 1.5}, "alltoall", {}),
    "z-loss": ({}, "alltoall", {"moe_z_loss_coeff": 0.3}),
    "z-loss, mean": (
        {"balance_scope": "sequence"},
        "alltoall_dedup",
        {"moe_z_loss_coeff": 0.3, "calculate_per_token_loss": False},
    ),
    "two layers": ({"two_layer_gate": True, "num_constant_experts": 0}, "allgather", {}),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_layer_against_reference(compiled, fused, name):
    moepp, dispatcher, changes = LAYERS[name]
    config = MoEPPConfig(4, balance_coeff=0.5, fused=fused, **moepp)
    layer = build_layer(config, dispatcher=dispatcher, **changes)
    check_layer(layer)


def test_recomputed_layer():
    config = MoEPPConfig(4, balance_coeff=0.5, capacity_factor=0.8)
    recompute = SELECTIVE
    check_layer(build_layer(config, **recompute))


@pytest.mark.parametrize("is_padded", [False, True])
def test_shared_experts_join_unscaled_and_return_nothing_for_padding(is_padded):
    config = MoEPPConfig(4, expert_input_scale=2.0)
    layer = build_layer(config, moe_shared_expert_intermediate_size=8)
    hidden, previous = inputs(config, LENGTH, BATCH)
    padding = mask() & is_padded
    output, _ = layer(hidden, previous, padding_mask=padding if is_padded else None)
    routed = reference_of(layer)(
        hidden.flatten(0, 1), previous.flatten(0, 1), padded_T=padding.T.reshape(-1)
    ).hidden_TD.view_as(hidden)
    shared = layer.shared_experts(hidden).masked_fill(padding.T.unsqueeze(-1), 0.0)
    assert_close(output, routed + shared, "output")
    assert not output[padding.T].any()


@pytest.mark.parametrize("all_padding", [False, True])
def test_masks_of_all_and_of_nothing(all_padding):
    config = MoEPPConfig(4, balance_coeff=0.5, capacity_factor=1.0)
    layer = build_layer(config, moe_z_loss_coeff=0.1)
    hidden, previous = inputs(config, LENGTH, BATCH)
    output, _ = layer(hidden, previous, padding_mask=torch.full((BATCH, LENGTH), all_padding))
    output.square().sum().backward()
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    if all_padding:
        assert not output.any()
        assert [name for name, grad in grads.items() if grad is not None and grad.any()] == []
        assert layer.statistics.num_tokens == 0
        return
    layer.zero_grad()
    layer.statistics.reset()
    unmasked, _ = layer(hidden, previous)
    unmasked.square().sum().backward()
    assert torch.equal(output, unmasked)
    for name, parameter in layer.named_parameters():
        assert_close(grads[name], parameter.grad, name)


def test_router_health_measures_tokens_alone():
    config = MoEPPConfig(4, balance_coeff=0.5)
    layer = build_layer(config)
    hidden, previous = inputs(config, LENGTH, 1)
    padding = mask()[1:2]

    def measured(*inputs, **kwargs):
        health = layer.router.health
        health.reset()
        health.enabled = True
        layer(*inputs, **kwargs)[0].sum().backward()
        return health.as_vector()

    with_padding = measured(hidden, previous, padding_mask=padding)
    tokens = ~padding[0]
    # Sums over the same tokens; without their neighbours matrix products round differently.
    torch.testing.assert_close(
        with_padding, measured(hidden[tokens], previous[tokens]), rtol=1e-5, atol=1e-5
    )
    measured(hidden, previous, padding_mask=padding)
    counts = layer.router.health.ffn_counts
    assert counts.shape == (LENGTH,)
    assert not counts[padding[0]].any()


def test_counts_by_group():
    layer = build_layer(MoEPPConfig(4))
    layer.statistics.num_groups = 1
    padding = mask()
    hidden, previous = inputs(layer.moepp, LENGTH, BATCH)
    tags = torch.zeros(LENGTH, BATCH, dtype=torch.int64)
    layer(hidden, previous, padding_mask=padding, tags=tags)
    groups, selected = layer.statistics.groups, layer.statistics.selected
    assert groups.tolist() == [[int(selected[:4].sum()), int((~padding).sum())]]


@pytest.mark.parametrize("with_bias", [False, True])
def test_vanilla_layer_counts_no_padding(with_bias):
    config = MoEPPConfig(4, **FFN_ONLY, gating_residual=False)
    changes = {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}
    layer = build_layer(config, **changes if with_bias else {})
    assert isinstance(layer, VanillaMoELayer)
    layer(torch.randn(LENGTH, BATCH, HIDDEN), padding_mask=mask())
    tokens = int((~mask()).sum())
    assert layer.statistics.num_tokens == tokens
    assert layer.statistics.selected.sum() == 2 * tokens
    if with_bias:
        assert torch.equal(layer.router.local_tokens_per_expert, layer.statistics.selected)


def test_mask_of_another_shape_is_refused():
    layer = build_layer(MoEPPConfig(4))
    hidden, previous = inputs(layer.moepp, LENGTH, BATCH)
    with pytest.raises(ValueError, match=r"padding_mask \(4, 8\) must have a value for each"):
        layer(hidden, previous, padding_mask=torch.zeros(8, 4, dtype=torch.bool))


def test_captured_router_refuses_a_mask():
    layer = build_transformer_layer(MoEPPConfig(4))
    layer.captured = SimpleNamespace(parts={CudaGraphModule.moe_router})
    with pytest.raises(ValueError, match="padding_mask must be None where .* moe_router"):
        layer._forward_moe(torch.randn(LENGTH, BATCH, HIDDEN), None, mask(), None)
