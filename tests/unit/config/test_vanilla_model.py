"""The vanilla baseline: every MoE++ configuration has one, and only what differs is changed."""

import pytest

from moepp_megatron.config import parse_config
from moepp_megatron.config.vanilla import vanilla
from tests.parallel.training_runs import settings


@pytest.mark.parametrize(
    "moe",
    [
        {},
        {"budget": {"target_ffn_per_token": 1.2}},
        {"budget": {"target_ffn_per_token": 1.2, "controller": "bias"}, "selection_bias": True},
        {"balance_scope": "global"},
        {"balance_loss": "grouped"},
        {"dispatcher": "alltoall_dedup"},
        {"two_layer_gate": True, "logits_norm_std": 1.0, "expert_input_scale": 2.0},
        {"selection_bias": True, "gate_scale": 2.0, "fused": False},
        {"constants_shared": True, "constant_init": "zero", "constant_temperature": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("guard", [{}, {"enabled": True}], ids=["no guard", "guard"])
def test_every_configuration_has_a_rival(moe, guard):
    config = parse_config(settings(moe=moe, routing_guard=guard))
    baseline = vanilla(config)
    assert baseline.moe.is_vanilla
    # The grouped loss has the scale of megatron-core's.
    scale = 1 if "balance_loss" in moe else 2 / 8
    assert baseline.moe.balance_coeff == config.moe.balance_coeff * scale
    assert not baseline.routing_guard.enabled
    assert baseline.model == config.model
    assert baseline.training == config.training


def test_a_sequence_loss_stays():
    moe = {"balance_scope": "sequence", "dispatcher": "allgather"}
    baseline = vanilla(parse_config(settings(moe=moe)))
    assert baseline.moe.balance_scope == "sequence"
    assert baseline.moe.dispatcher == "allgather"
