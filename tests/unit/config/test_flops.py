"""FLOP a token against counts by hand and by torch."""

import pytest

from moepp_megatron.config import count_parameters, load_config
from moepp_megatron.config.flops import forward_flops_per_token, training_flops_per_token
from tests import ROOT

QUICKSTART = ROOT / "configs/quickstart.yaml"
PAPER = ROOT / "configs/models/moepp_0.6b_8_4.yaml"


def test_a_vanilla_layer_by_hand():
    config = load_config(
        PAPER,
        [
            "moe.num_zero_experts=0",
            "moe.num_copy_experts=0",
            "moe.num_constant_experts=0",
            "moe.gating_residual=false",
        ],
    )
    layers, d, ffn, s, vocab, topk, experts = 12, 768, 2048, 2048, 65536, 2, 8
    by_hand = layers * (8 * d * d + 4 * s * d + topk * 6 * d * ffn + 2 * d * experts)
    assert forward_flops_per_token(config, 1.0) == by_hand + 2 * d * vocab
    assert training_flops_per_token(config, 1.0) == 3 * (by_hand + 2 * d * vocab)


def test_a_layer_of_multi_token_prediction_by_hand():
    plain, further = (load_config(PAPER, [f"model.mtp_num_layers={depths}"]) for depths in (0, 2))
    added = forward_flops_per_token(further, 1.0) - forward_flops_per_token(plain, 1.0)
    d, ffn, s, vocab, experts = 768, 2048, 2048, 65536, 12
    attention, ffns = 8 * d * d + 4 * s * d, 2 * 6 * d * ffn
    router = 2 * (experts * d + experts * experts)
    local = plain.moe.local_flops(d)
    projections = 2 * 2 * d * d + 2 * d * vocab
    assert added == 2 * (attention + ffns + router + local + projections)


def test_only_experts_that_were_taken_count():
    config = load_config(PAPER)
    every = forward_flops_per_token(config, 1.0)
    half = forward_flops_per_token(config, 0.5)
    assert every - half == 12 * 2 * 0.5 * 6 * 768 * 2048


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["moe.two_layer_gate=true"],
        ["moe.layer_freq=2", "moe.shared_expert_ffn_hidden_size=64"],
        ["model.num_query_groups=2"],
    ],
)
def test_two_flop_a_weight_that_a_token_meets(overrides):
    config = load_config(QUICKSTART, overrides)
    model, counts = config.model, count_parameters(config)
    moe_layers = sum(config.moe.moe_layer_pattern(model.num_layers))
    # What `active` counts and no token multiplies: norms, one of the two [V, D] tables, and the
    # constant experts, of which the closed form computes all for every token.
    embedding = model.vocab_size * model.hidden_size
    constants = counts.zero_computation_experts
    share = 1 - config.moe.ffn_share
    taken = config.moe.router_topk * share / config.moe.num_zero_computation_experts
    weights = counts.active - counts.norms - embedding - constants * taken + constants
    scores = 4 * model.seq_length * model.num_attention_heads * model.head_dim * model.num_layers
    copies = 2 * model.hidden_size * moe_layers
    expected = 2 * weights + scores + copies
    # `active` is rounded to whole parameters.
    assert forward_flops_per_token(config, config.moe.ffn_share) == pytest.approx(expected, abs=2)
