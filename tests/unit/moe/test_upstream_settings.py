"""Every setting of megatron-core's MoE layers is honoured, taken from MoEPPConfig, or refused."""

import dataclasses
import logging
import re

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe import moe_layer
from megatron.core.transformer.transformer_config import MLATransformerConfig

from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.dedup_dispatcher import DedupAlltoAllTokenDispatcher
from moepp_megatron.moe.dispatcher import FFNAlltoAllTokenDispatcher
from moepp_megatron.moe.spec import get_moepp_layer_spec
from moepp_megatron.moe.upstream_private import check_upstream
from moepp_megatron.moe.upstream_settings import (
    HONOURED,
    IDLE,
    OURS,
    REFUSED,
    refuse_ignored,
    undecided,
)
from moepp_megatron.moe.upstream_versions import GONE_FIELDS, NEW_FIELDS, version
from tests.unit.moe.builders import HIDDEN, megatron_config, of_kinds, randomize

MOEPP = MoEPPConfig(4)
FIELDS = {field.name: field for field in dataclasses.fields(MLATransformerConfig)}
# A value of each refused setting that asks for something.
WANTED = {
    "moe_latent_size": 8,
    "moe_expert_capacity_factor": 1.5,
    "moe_token_drop_policy": "position",
    "moe_expert_rank_capacity_factor": 1.5,
    "mlp_chunks_for_training": 2,
    "mlp_chunks_for_prefill": 2,
    "moe_router_num_groups": 2,
    "moe_router_group_topk": 1,
    "moe_router_topk_limited_devices": 2,
    "moe_router_force_biased": 0.0,
    "transformer_impl": "inference_optimized",
    "experimental_attention_variant": "dsa",
    "mtp_num_layers": 1,
}


def config_with(**changes):
    """Set afterwards: megatron-core's own checks demand GPUs or further settings for some."""
    config = megatron_config(MOEPP)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def test_every_field_is_decided_once():
    """Should this fail after an upgrade: read what the new field does, and put it into a table."""
    decided = [*HONOURED, *OURS, *REFUSED, *IDLE]
    assert len(decided) == len(set(decided)), "a field is in two tables"
    of_others = NEW_FIELDS if version().startswith("0.19.") else GONE_FIELDS
    assert set(decided) - FIELDS.keys() == of_others, "megatron-core lacks a field"
    assert undecided(MLATransformerConfig) == {}, "nobody has decided what MoE++ layers make of it"


def test_a_field_of_a_later_version_is_named_and_keeps_its_default(monkeypatch, caplog):
    monkeypatch.delitem(REFUSED, "moe_latent_size")
    undecided.cache_clear()
    check_upstream.cache_clear()
    with caplog.at_level(logging.WARNING):
        check_upstream()
    (record,) = caplog.records
    assert record.message.endswith("must keep their defaults: moe_latent_size")
    refuse_ignored(config_with(), MOEPP)
    message = r"TransformerConfig.moe_latent_size \(8\) must be left at its default \(None\)"
    with pytest.raises(ValueError, match=message):
        refuse_ignored(config_with(moe_latent_size=8), MOEPP)
    undecided.cache_clear()


def test_what_idles_belongs_to_what_is_refused_or_decided_by_us():
    assert set(IDLE.values()) <= REFUSED.keys() | OURS.keys()


def test_defaults_are_allowed():
    for name in REFUSED.keys() & FIELDS.keys():
        assert FIELDS[name].default in REFUSED[name].allowed, name
    for name, ours in OURS.items():
        assert not ours.unset or FIELDS[name].default in ours.unset, name
    refuse_ignored(megatron_config(MOEPP), MOEPP)


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_ignored_is_refused_with_reason_and_remedy(name):
    rule = REFUSED[name]
    value = WANTED.get(name, True)
    config = config_with(**{name: value})
    message = re.escape(
        f"TransformerConfig.{name} ({value}) is not supported by the MoE++ layer, because "
        f"{rule.reason}; use {rule.allowed[0]}"
    )
    with pytest.raises(ValueError, match=message):
        get_moepp_layer_spec(config, MOEPP, use_transformer_engine=False)
    # A configuration that was changed after the spec had been made.
    spec = get_moepp_layer_spec(megatron_config(MOEPP), MOEPP, use_transformer_engine=False)
    with pytest.raises(ValueError, match=message):
        spec.submodules.mlp(config=config, pg_collection=None)


@pytest.mark.parametrize(
    ("name", "value", "field"),
    [
        ("moe_aux_loss_coeff", 0.02, "balance_coeff 0.01"),
        ("moe_aux_loss_coeff", [0.01, 0.02], "balance_coeff 0.01"),
        ("moe_router_load_balancing_type", "seq_aux_loss", "balance_scope microbatch"),
        ("moe_router_load_balancing_type", "sinkhorn", "balance_scope microbatch"),
        ("moe_router_load_balancing_type", "quantile_balancing", "balance_scope microbatch"),
        ("moe_router_load_balancing_type", ["aux_loss", "seq_aux_loss"], "balance_scope microb"),
        ("moe_router_score_function", "sigmoid", "score_function softmax"),
        ("moe_router_score_function", "sqrtsoftplus", "score_function softmax"),
        ("moe_router_topk_scaling_factor", 2.5, "gate_scale 1.0"),
        ("moe_router_topk_scaling_factor", 0.0, "gate_scale 1.0"),
        ("moe_router_topk", 1, "router_topk 2"),
    ],
)
def test_what_moepp_config_decides_must_agree(name, value, field):
    message = re.escape(
        f"TransformerConfig.{name} ({value}) must equal the MoEPPConfig's value ({field}"
    )
    with pytest.raises(ValueError, match=message):
        refuse_ignored(
            config_with(**{"moe_router_load_balancing_type": "aux_loss", name: value}), MOEPP
        )


@pytest.mark.parametrize(
    ("settings", "own"),
    [
        ({"moe_aux_loss_coeff": 0.02}, {"balance_coeff": 0.02}),
        ({"moe_router_load_balancing_type": "seq_aux_loss"}, {"balance_scope": "sequence"}),
        ({"moe_router_load_balancing_type": "none"}, {"balance_scope": "sequence"}),
        ({"moe_router_score_function": "sigmoid"}, {"score_function": "sigmoid"}),
        ({"moe_router_topk_scaling_factor": 2.5}, {"gate_scale": 2.5}),
        ({"moe_router_pre_softmax": True}, {"gate_normalization": "none"}),
        ({}, {"score_function": "sigmoid", "gate_scale": 2.5, "gate_normalization": "nonzero"}),
    ],
)
def test_what_agrees_or_is_unset_is_accepted(settings, own):
    refuse_ignored(config_with(**settings), dataclasses.replace(MOEPP, **own))


def test_normalised_gates_contradict_scores_before_the_selection():
    moepp = dataclasses.replace(MOEPP, gate_normalization="selected")
    message = r"pre_softmax \(True\) must equal .*\(gate_normalization selected\).*; use False, or"
    with pytest.raises(ValueError, match=message):
        refuse_ignored(config_with(moe_router_pre_softmax=True), moepp)


def test_megatrons_own_layer_keeps_its_settings():
    vanilla = of_kinds((4, 0, 0, 0), 2, gating_residual=False)
    config = megatron_config(vanilla, moe_router_num_groups=2, moe_router_group_topk=1)
    get_moepp_layer_spec(config, vanilla, use_transformer_engine=False)


# ---- our dispatchers in megatron-core's own layer ------------------------------------------


def megatrons_layer(monkeypatch, dispatcher, **changes):
    monkeypatch.setattr(moe_layer, "MoEAlltoAllTokenDispatcher", dispatcher)
    config = megatron_config(MOEPP, **changes)
    spec = get_gpt_layer_local_spec(num_experts=4, moe_grouped_gemm=False)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return spec.submodules.mlp(config=config, pg_collection=groups, is_mtp_layer=False)


@pytest.mark.parametrize("kind", [FFNAlltoAllTokenDispatcher, DedupAlltoAllTokenDispatcher])
def test_dispatchers_refuse_steps_of_shared_experts(monkeypatch, kind):
    shared = {"moe_shared_expert_intermediate_size": 8}
    message = rf"moe_shared_expert_overlap \(True\) is not supported by {kind.__name__}, because"
    with pytest.raises(ValueError, match=message):
        megatrons_layer(monkeypatch, kind, moe_shared_expert_overlap=True, **shared)
    layer = megatrons_layer(monkeypatch, kind, **shared)
    layer.set_layer_number(1)
    layer.cpu()
    randomize(layer)
    hidden = torch.randn(6, 2, HIDDEN)
    with torch.no_grad():
        with_shared, _ = layer(hidden)
        for parameter in layer.shared_experts.parameters():
            parameter.zero_()
        without_shared, _ = layer(hidden)
    assert not torch.equal(with_shared, without_shared)
