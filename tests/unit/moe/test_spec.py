"""The modules that the specs build, and the settings they refuse."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.common.fine_grained_callables import build_transformer_layer_callables
from megatron.core.process_groups_config import ProcessGroupCollection

from moepp_megatron.model.gpt import MoEPPGPTModel
from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.dispatcher import build_dispatcher
from moepp_megatron.moe.lane import MoEPPTransformerLayer
from moepp_megatron.moe.layer import MoEPPLayer, moe_statistics
from moepp_megatron.moe.spec import get_moepp_block_spec, moe_layer_pattern
from moepp_megatron.moe.upstream_settings import router_config
from tests.unit.moe.builders import (
    HIDDEN,
    SEQUENCE,
    VOCAB,
    assert_close,
    build_model,
    build_transformer_layer,
    megatron_config,
    randomize,
    token_losses,
)

MOEPP = MoEPPConfig(4)


@pytest.mark.parametrize(
    ("freq", "expected"),
    [
        (1, [True, True, True, True]),
        (2, [True, False, True, False]),
        (3, [True, False, False, True]),
        ([0, 1, 0, 1], [False, True, False, True]),
        ([0, 0, 0, 1], [False, False, False, True]),
    ],
)
def test_pattern(freq, expected):
    config = megatron_config(MOEPP, num_layers=4, moe_layer_freq=freq)
    assert moe_layer_pattern(config) == expected


@pytest.mark.parametrize("freq", [[1, 0, 1], [0, 0, 0, 0]])
def test_pattern_refuses_what_fits_no_model(freq):
    config = megatron_config(MOEPP, num_layers=4)
    config.moe_layer_freq = freq
    with pytest.raises(ValueError, match=r"moe_layer_freq \(\[.*\]\) must give 0 or 1 for each of"):
        moe_layer_pattern(config)


@pytest.mark.parametrize("freq", [1, 2, [0, 1, 0, 1]], ids=str)
@pytest.mark.parametrize("gating_residual", [True, False])
def test_model_follows_the_pattern(freq, gating_residual):
    moepp = dataclasses.replace(MOEPP, gating_residual=gating_residual)
    model = build_model(moepp, num_layers=4, moe_layer_freq=freq)
    pattern = moe_layer_pattern(model.config)
    first = pattern.index(True)
    for index, (layer, is_moe) in enumerate(zip(model.decoder.layers, pattern, strict=True)):
        assert type(layer) is MoEPPTransformerLayer
        assert isinstance(layer.mlp, MoEPPLayer) == is_moe
        if is_moe:
            has_residual = layer.mlp.router.residual_weight is not None
            assert has_residual == (gating_residual and index > first)
    assert sorted(moe_statistics(model)) == [n for n, is_moe in enumerate(pattern, 1) if is_moe]


@torch.no_grad()
def test_constants_can_start_at_zero():
    drawn, zero = (
        build_model(dataclasses.replace(MOEPP, constant_init=init)) for init in ("normal", "zero")
    )
    others = dict(zero.named_parameters())
    for name, parameter in drawn.named_parameters():
        assert parameter.abs().max() > 0, name
        if name.endswith("zero_computation.constants"):
            assert others[name].abs().max() == 0
        else:
            assert torch.equal(parameter, others[name]), name


def test_vectors_learn_from_zero():
    # Megatron's own loop initialises as it builds.
    layer = build_transformer_layer(
        dataclasses.replace(MOEPP, constant_init="zero"), perform_initialization=True
    )
    zero_computation = layer.mlp.zero_computation
    assert zero_computation.constants.abs().max() == 0
    assert zero_computation.mixing_weight.abs().max() > 0
    tokens = torch.randn(6, HIDDEN)
    gates = torch.ones(6, MOEPP.num_experts)
    zero_computation(tokens, gates).square().sum().backward()
    for name, parameter in zero_computation.named_parameters():
        assert (parameter.grad.abs().flatten(1).amax(dim=1) > 0).all(), name


def test_dense_layer_hands_the_lane_on():
    model = build_model(MOEPP, num_layers=4, moe_layer_freq=[1, 0, 1, 0])
    dense = model.decoder.layers[1]
    lane = torch.randn(6, 2, 8)
    hidden, handed_on = dense(torch.randn(6, 2, HIDDEN), context=lane)
    assert handed_on is lane
    _, nothing = dense(hidden, context=None)
    assert nothing is None


def test_gradients_reach_earlier_routers_through_the_lane():
    # The way through the hidden states does not depend on G_3, so what differs without G_3 is the
    # way through the lane: d sum(z_3) / d z_1 gains the column sums of G_3.
    model = build_model(MOEPP, num_layers=4, moe_layer_freq=[1, 0, 1, 0])
    randomize(model, std=0.1)
    first, third = (model.decoder.layers[index].mlp.router for index in (0, 2))
    tokens = torch.randint(VOCAB, (2, SEQUENCE + 1))

    def gradient():
        logits = {}
        hooks = [
            router.register_forward_hook(
                lambda module, _, routing: logits.__setitem__(module, routing.logits)
            )
            for router in (first, third)
        ]
        token_losses(model, tokens)
        for hook in hooks:
            hook.remove()
        return torch.autograd.grad(logits[third].sum(), logits[first])[0]

    with_lane = gradient()
    column_sums = third.residual_weight.detach().sum(dim=0)
    with torch.no_grad():
        third.residual_weight.zero_()
    through_lane = with_lane - gradient()
    assert column_sums.abs().min() > 0
    assert_close(through_lane, column_sums.expand_as(through_lane), "gradient through the lane")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_moe_experts": 8},
            r"TransformerConfig.num_moe_experts \(8\) must equal the MoEPPConfig's value "
            r"\(num_ffn_experts 4\); num_moe_experts counts FFN experts only",
        ),
        (
            {"moe_router_topk": 1},
            r"TransformerConfig.moe_router_topk \(1\) must equal .* value \(router_topk 2\)",
        ),
        (
            {"moe_expert_capacity_factor": 1.5},
            r"moe_expert_capacity_factor \(1.5\) is not .* set MoEPPConfig.capacity_factor",
        ),
    ],
)
def test_router_config_refuses_contradictions(changes, message):
    config = megatron_config(MOEPP)
    # Set afterwards: megatron-core demands further settings beside some.
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        router_config(config, MOEPP)


def test_router_config_leaves_the_models_alone():
    config = megatron_config(MOEPP, moe_router_load_balancing_type="aux_loss")
    own = router_config(config, MOEPP)
    assert (own.num_moe_experts, config.num_moe_experts) == (8, 4)
    assert own.moe_router_load_balancing_type == "none"
    assert config.moe_router_load_balancing_type == "aux_loss"


@pytest.mark.parametrize(
    ("changes", "deduplicate", "message"),
    [
        ({"moe_token_dispatcher_type": "other"}, False, r"\(other\) must be .* use alltoall"),
        ({"moe_token_dispatcher_type": "allgather"}, True, r"\(allgather\) must be alltoall with"),
        # megatron-core allows it with FP8 only.
        ({"moe_router_padding_for_quantization": True}, True, r"quantization \(True\) must be Fa"),
        ({"overlap_moe_expert_parallel_comm": True}, True, "frees what is still on its way"),
    ],
)
def test_dispatchers_that_cannot_carry_the_routing(changes, deduplicate, message):
    config = megatron_config(MOEPP)
    vars(config).update(changes)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    with pytest.raises(ValueError, match=message):
        build_dispatcher(4, [0, 1, 2, 3], config, groups, deduplicate=deduplicate)


def test_upstreams_nodes_would_drop_the_router_logits():
    """Should this fail after an upgrade: megatron-core's own nodes may carry the lane by now."""
    layer = build_transformer_layer(MOEPP, has_residual=False)
    (pre_dispatch, *_), _ = build_transformer_layer_callables(layer)
    hidden = torch.randn(4, 2, HIDDEN, requires_grad=True)
    node = SimpleNamespace(chunk_state=empty_chunk_state(), layer_state=SimpleNamespace())
    with pytest.raises(ValueError, match="drops its logits; build the model as MoEPPGPTModel"):
        pre_dispatch(node, hidden)


def empty_chunk_state():
    names = ("attention_mask", "packed_seq_params", "sequence_len_offset")
    rotary = ("rotary_pos_emb", "rotary_pos_cos", "rotary_pos_sin")
    return SimpleNamespace(**dict.fromkeys((*names, *rotary)))


@pytest.mark.parametrize("setting", ["mrope", "defer_embedding_wgrad_compute", "fp8_output_proj"])
def test_what_a_hybrid_model_lacks_is_refused(setting):
    config = megatron_config(MOEPP)
    # megatron-core itself takes two of them only with other settings; the third is no field.
    setattr(config, setting, True)
    embedding = "mrope" if setting == "mrope" else "rope"
    spec = get_moepp_block_spec(config, MOEPP, use_transformer_engine=False)
    with pytest.raises(ValueError, match=rf"{setting}.* must not be given"):
        MoEPPGPTModel(config, spec, 64, 16, moepp=MOEPP, position_embedding_type=embedding)
