"""A new value of a setting is refused by what does not compute it yet, not taken for another."""

import pytest
import torch

from moepp_megatron.experts import LOCAL_KINDS
from moepp_megatron.moe import zero_computation
from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.reference import balance_loss, select_experts
from moepp_megatron.moe.selection import select
from tests.unit.moe.builders import build_layer
from tests.unit.moe.test_kernels import compiled  # noqa: F401

REFUSED = (AssertionError, KeyError)


def with_value(name, value="unlisted"):
    config = MoEPPConfig(4, num_constant_experts=1)
    object.__setattr__(config, name, value)
    return config


USES = {
    "selection": (
        "gate_normalization",
        lambda config, _: select(torch.zeros(3, config.num_experts), None, config, None),
    ),
    "reference": (
        "gate_normalization",
        lambda config, _: select_experts(torch.zeros(3, config.num_experts), config),
    ),
    "kernel": (
        "gate_normalization",
        lambda config, kernels: kernels.select(
            torch.zeros(3, config.num_experts), None, config, None
        ),
    ),
    "balance loss": (
        "balance_scope",
        lambda config, _: build_layer(config).router.routing(torch.zeros(3, 2, config.num_experts)),
    ),
    "kind of balance loss": (
        "balance_loss",
        lambda config, _: build_layer(config).router.routing(torch.zeros(3, 2, config.num_experts)),
    ),
    "balance loss of the reference": (
        "balance_loss",
        lambda config, _: balance_loss(torch.ones(3, 4), torch.ones(3, 4), config),
    ),
    "initial constants": ("constant_init", lambda config, _: build_layer(config)),
}


@pytest.mark.parametrize("use", USES)
def test_layer(compiled, use):  # noqa: F811
    name, compute = USES[use]
    with pytest.raises(REFUSED, match="unlisted"):
        compute(with_value(name), compiled)


@pytest.mark.parametrize("kind", LOCAL_KINDS, ids=lambda kind: kind.name)
def test_kinds_of_experts(kind, monkeypatch):
    config = MoEPPConfig(4, **{each.setting: 1 for each in LOCAL_KINDS})
    others = tuple(each for each in LOCAL_KINDS if each is not kind)
    monkeypatch.setattr(zero_computation, "_COMPUTED", others)
    with pytest.raises(AssertionError, match=f"{kind.name} experts are undefined"):
        build_layer(config)
