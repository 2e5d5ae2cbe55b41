"""Whole models in FP8: what runs in it, what does not, and in which layers."""

import pytest
import torch
from transformer_engine.pytorch import Linear
from transformer_engine.pytorch.record import CALLS

from tests.te_stand_in.models import RECIPES, calls_of, config_of, losses, model_of

EXPERTS = ("TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear")
DENSE = ("TELayerNormColumnParallelLinear", "TERowParallelLinear")


def test_an_argument_that_transformer_engine_does_not_have_is_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'fp8'"):
        Linear(16, 16, fp8=True)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_gemm_of_the_layers_runs_in_fp8(recipe):
    model = model_of(config_of(recipe))
    logits = []
    for layer in model.decoder.layers:
        if hasattr(layer.mlp, "router"):
            layer.mlp.router.register_forward_hook(lambda *call: logits.append(call[2].logits))
    losses(model).sum().backward()
    assert {call.module for call in CALLS} == {*EXPERTS, *DENSE}
    assert {call.recipe for call in CALLS} == {RECIPES[recipe]}
    assert [value.dtype for value in logits] == [torch.float32] * 4
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_layers_at_the_ends_run_in_bf16():
    precision = {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 2}
    config = config_of("tensorwise", precision=precision)
    losses(model_of(config))
    for module in (*DENSE, *EXPERTS):
        recipes = [call.recipe for call in calls_of(module)]
        assert recipes == [None, None, RECIPES["tensorwise"], None], module


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
    ],
    ids=["moe", "full"],
)
def test_recomputation_repeats_the_first_pass(recipe, recompute):
    """The same gradients to the bit: the same operands, quantised in the same context."""
    gradients = []
    for training in ({}, recompute):
        model = model_of(config_of(recipe, training=training))
        losses(model).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert {call.recipe for call in CALLS} == {RECIPES[recipe]}
    forward_passes = [len(calls_of(module)) for module in EXPERTS]
    assert forward_passes == [4 + 8] * 2, "without recomputation 4, with it 8"
    for name, expected in gradients[0].items():
        assert torch.equal(gradients[1][name], expected), name


def test_evaluation_runs_in_fp8_too():
    model = model_of(config_of("blockwise")).eval()
    with torch.no_grad():
        losses(model)
    assert {call.recipe for call in CALLS} == {RECIPES["blockwise"]}


def test_shared_experts_and_dense_layers_run_in_fp8():
    moe = {"layer_freq": [0, 1, 1, 1], "shared_expert_ffn_hidden_size": 32}
    model = model_of(config_of("delayed", moe=moe))
    losses(model).sum().backward()
    assert {call.recipe for call in CALLS} == {RECIPES["delayed"]}
    assert len(calls_of("TEColumnParallelLinear")) == 3, "shared experts"
    assert len(calls_of(DENSE[0])) == 4 + 1, "attention, and the dense layer's norm and FFN"
