"""MoEPPConfig: its errors and its derived numbers."""

import math

import pytest

from moepp_megatron.experts import FFN_ONLY
from moepp_megatron.moe.config import MoEPPConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_ffn_experts": 0}, r"num_ffn_experts \(0\) must be at least 1; use 1 or more"),
        ({"num_zero_experts": -1}, r"num_zero_experts \(-1\) must not be negative; use 0"),
        (
            {"router_topk": 0},
            r"router_topk \(0\) must be between 1 and the number of experts \(8\)",
        ),
        (
            {"router_topk": 9},
            r"router_topk \(9\) must be between 1 and the number of experts \(8\)",
        ),
        ({"tau": 0.0}, r"tau \(0.0\) must be positive; use 0.75"),
        ({"tau": math.nan}, r"tau \(nan\) must be positive; use 0.75"),
        ({"balance_coeff": -0.1}, r"balance_coeff \(-0.1\) must not be negative; use 0"),
        ({"capacity_factor": 0.0}, r"capacity_factor \(0.0\) must be positive; .* None"),
        ({"constant_temperature": math.inf}, r"constant_temperature \(inf\) must be positive"),
        ({"constant_init": "one"}, r"constant_init \(one\) is unknown; use normal or zero"),
        (
            {"gate_normalization": "sum"},
            r"gate_normalization \(sum\) is unknown; use none, selected or nonzero",
        ),
        (
            {"gate_normalization": "nonzero", "router_topk": 1},
            r"gate_normalization \(nonzero\) must be none when router_topk is 1, because one gate",
        ),
        ({"fused": "yes"}, r"fused \(yes\) is unknown; use auto, True or False"),
        ({"score_function": "tanh"}, r"score_function \(tanh\) .* use softmax, sigmoid or sqrt"),
        (
            {"balance_scope": "batch"},
            r"balance_scope \(batch\) is unknown; use microbatch, sequence or global",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_errors_name_value_rule_and_remedy(settings, message):
    with pytest.raises(ValueError, match=message):
        MoEPPConfig(**({"num_ffn_experts": 4} | settings))


def test_every_expert_may_be_selected():
    assert MoEPPConfig(4, router_topk=8).num_experts == 8


@pytest.mark.parametrize(
    "setting",
    [
        {"two_layer_gate": True},
        {"expert_input_scale": 2.0},
        {"logits_norm_std": 1.0},
        {"deduplicate_dispatch": True},
    ],
)
def test_vanilla_refuses_what_it_would_ignore(setting):
    ((name, value),) = setting.items()
    with pytest.raises(
        ValueError, match=rf"{name} \({value}\) must be .* without zero-computation"
    ):
        MoEPPConfig(4, gating_residual=False, **FFN_ONLY, **setting)
    MoEPPConfig(4, gating_residual=True, **FFN_ONLY, **setting)


def test_only_ffn_experts_are_given_without_their_name():
    """The kinds have no order that a caller would guess."""
    assert MoEPPConfig(4).num_ffn_experts == 4
    with pytest.raises(TypeError, match="num_ffn_experts"):
        MoEPPConfig()
    with pytest.raises(TypeError, match="positional"):
        MoEPPConfig(4, 1)
