"""Norms over all heads serve beside Transformer Engine's modules, and are the same there."""

from __future__ import annotations

import pytest
import torch

from moepp_megatron.model.all_heads_norm import AllHeadsRMSNorm
from tests.te_stand_in.models import RECIPES, config_of, losses, model_of
from tests.te_stand_in.test_latent_attention import assert_alike, both_models

MODEL = {"qk_layernorm": True, "qk_layernorm_scope": "all_heads"}


def test_same_seed_gives_the_same_model(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(None, model=MODEL, precision={"dtype": "fp32"})
    theirs, ours = both_models(config, monkeypatch)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    norms = [name for name, _ in ours.named_parameters() if "q_layer" in name or "k_layer" in name]
    assert len(norms) == 2 * config.model.num_layers
    for name in norms:
        gradient = ours.get_parameter(name).grad
        assert gradient.shape == (32,)
        assert_alike(gradients[name], gradient)


def test_fp8_leaves_them_in_bf16() -> None:
    recipe = next(iter(RECIPES))
    model = model_of(config_of(recipe, model=MODEL))
    losses(model).sum().backward()
    norms = [module for module in model.modules() if isinstance(module, AllHeadsRMSNorm)]
    assert len(norms) == 2 * 4
    for norm in norms:
        assert norm.weight.dtype == torch.bfloat16
        assert norm.weight.grad.isfinite().all()
        assert norm.weight.grad.abs().max() > 0
