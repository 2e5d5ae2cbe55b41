"""Whole models in FP8: what runs in it, what does not, and in which layers."""

import pytest
import torch
from transformer_engine.pytorch.record import CALLS

from tests.parallel.training_runs import FULL, SELECTIVE
from tests.te_stand_in.models import (
    EXPERTS,
    RECIPES,
    assert_gradients,
    calls_of,
    config_of,
    losses,
    model_of,
)

DENSE = ("TELayerNormColumnParallelLinear", "TERowParallelLinear", "TEColumnParallelLinear")


ALL_HEADS = {"qk_layernorm": True, "qk_layernorm_scope": "all_heads"}
SHARED = {"layer_freq": [0, 1, 1, 1], "shared_expert_ffn_hidden_size": 32}
# Settings; passes of norm with projection, of output projections and of other projections.
MODELS = {
    "plain": ({}, (4, 4, 0)),
    "norms of all heads": ({"model": ALL_HEADS}, (4, 4, 0)),
    "a projection of two vectors to one": ({"model": {"mtp_num_layers": 1}}, (5, 5, 1)),
    "shared experts and a dense layer": ({"moe": SHARED}, (5, 4 + 1 + 3, 3)),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", MODELS)
def test_every_gemm_of_the_layers_runs_in_fp8(recipe, kind):
    sections, passes = MODELS[kind]
    model = model_of(config_of(recipe, **sections))
    logits = []
    for layer in model.decoder.layers:
        if hasattr(layer.mlp, "router"):
            layer.mlp.router.register_forward_hook(lambda *call: logits.append(call[2].logits))
    losses(model).sum().backward()
    assert {call.module for call in CALLS} <= {*EXPERTS, *DENSE}
    assert tuple(len(calls_of(module)) for module in DENSE) == passes
    assert {call.recipe for call in CALLS} == {RECIPES[recipe]}
    assert {value.dtype for value in logits} == {torch.float32}
    assert_gradients(model)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("recompute", "extra"),
    [
        (SELECTIVE, 0),
        (FULL | {"recompute_num_layers": 2}, 0),
        (FULL, 1),
    ],
    ids=["moe", "full", "multi-token prediction"],
)
def test_recomputation_repeats_the_first_pass(recipe, recompute, extra):
    """The same gradients to the bit: the same operands, quantised in the same context."""
    gradients = []
    for training in ({}, recompute):
        model = model_of(config_of(recipe, training=training, model={"mtp_num_layers": extra}))
        losses(model).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert {call.recipe for call in CALLS} == {RECIPES[recipe]}
    forward_passes = [len(calls_of(module)) for module in EXPERTS]
    assert forward_passes == [3 * (4 + extra)] * 2, "once without recomputation, twice with it"
    for name, expected in gradients[0].items():
        assert torch.equal(gradients[1][name], expected), name


def test_evaluation_runs_in_fp8_too():
    model = model_of(config_of("blockwise")).eval()
    with torch.no_grad():
        losses(model)
    assert {call.recipe for call in CALLS} == {RECIPES["blockwise"]}
