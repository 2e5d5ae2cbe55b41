"""Static rows where Transformer Engine computes the rest: its experts' parameters, our product."""

import pytest
import torch

from moepp_megatron.moe.layer import moepp_layers
from moepp_megatron.training.setup import build_training_model
from tests.te_stand_in.models import EXPERTS, calls_of, config_of
from tests.te_stand_in.test_checkpoint import save_and_load, step


def built(static_rows):
    moe, precision = {"static_rows": static_rows}, {"dtype": "fp32"}
    return build_training_model(config_of(None, moe=moe, precision=precision))


def stepped(model):
    """Loss and gradients of a step in which layers with static rows use them."""
    for layer in moepp_layers(model.models[0]):
        layer.is_static = layer.moepp.static_rows is not None
    loss = float(step(model))
    named = model.models[0].named_parameters()
    return loss, {name: parameter.main_grad.clone() for name, parameter in named}


def are_equal(found, expected):
    """As fp32: products are the same, sums and gates in another order."""
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_a_step_is_that_of_transformer_engine():
    static = stepped(built(2.0))
    assert not any(map(calls_of, EXPERTS))
    are_equal(static, stepped(built(None)))
    assert all(map(calls_of, EXPERTS))


@pytest.mark.parametrize("kinds", [(2.0, None), (None, 2.0)], ids=str)
def test_a_run_continues_over_a_change(tmp_path, kinds):
    """With the weights and the optimizer's state of a checkpoint, and as if nothing had changed."""
    first, second = map(built, kinds)
    for _ in range(2):
        stepped(first)
    save_and_load(tmp_path, first, second)
    pairs = zip(first.models[0].parameters(), second.models[0].parameters(), strict=True)
    assert all(torch.equal(found, expected) for found, expected in pairs)
    for _ in range(2):
        are_equal(stepped(second), stepped(first))
