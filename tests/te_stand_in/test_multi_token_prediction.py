"""Layers of multi-token prediction in FP8, and in bf16 as those of megatron-core's own modules."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler
from transformer_engine.pytorch.record import CALLS

from tests.parallel.training_runs import FULL
from tests.te_stand_in.models import RECIPES, calls_of, config_of, losses, model_of
from tests.te_stand_in.test_latent_attention import assert_alike, both_models

MODEL = {"mtp_num_layers": 1}


@pytest.fixture(autouse=True)
def scale() -> None:
    MTPLossAutoScaler.set_loss_scale(torch.tensor(1.0))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_gemm_runs_in_fp8(recipe: str) -> None:
    model = model_of(config_of(recipe, model=MODEL))
    losses(model).sum().backward()
    assert {call.recipe for call in CALLS} == {RECIPES[recipe]}
    assert len(calls_of("TEColumnParallelLinear")) == 1, "the projection of two vectors to one"
    assert len(calls_of("TELayerNormColumnParallelLinear")) == 4 + 1, "attention"
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("recipe", RECIPES)
def test_recomputation_repeats_the_first_pass(recipe: str) -> None:
    """The same gradients to the bit: the same operands, quantised in the same context."""
    gradients = []
    for training in ({}, FULL):
        model = model_of(config_of(recipe, model=MODEL, training=training))
        losses(model).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert {call.recipe for call in CALLS} == {RECIPES[recipe]}
    for name, expected in gradients[0].items():
        assert torch.equal(gradients[1][name], expected), name


def test_same_seed_gives_the_same_model(monkeypatch: pytest.MonkeyPatch) -> None:
    models = both_models(config_of(None, model=MODEL, precision={"dtype": "fp32"}), monkeypatch)
    assert_alike(*(model.mtp.layers[0].eh_proj.weight.grad for model in models))
