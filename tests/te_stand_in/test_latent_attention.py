"""Transformer Engine's modules make the models of megatron-core's own; latent attention in FP8."""

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from transformer_engine.pytorch.record import CALLS

from moepp_megatron.model import build, megatron_config
from moepp_megatron.model.initialize import _sharded_tensors
from tests.parallel.training_runs import LATENT_WIDTHS
from tests.refusals import config_error
from tests.te_stand_in.models import (
    RECIPES,
    assert_gradients,
    compare_gradients,
    config_of,
    losses,
    model_of,
)
from tests.te_stand_in.test_model import ALL_HEADS

# The model, and its parameters that are compared with how many there are.
PROJECTIONS = r"\.self_attention\.(?!.*norm)"
MODELS = {
    "compressed": ({"qk_layernorm": True, "latent_attention": LATENT_WIDTHS}, PROJECTIONS, 4 * 5),
    "no norms": ({"latent_attention": LATENT_WIDTHS}, PROJECTIONS, 4 * 5),
    "queries from the input": (
        {"latent_attention": LATENT_WIDTHS | {"q_lora_rank": None}},
        PROJECTIONS,
        4 * 4,
    ),
    "norms of all heads": (ALL_HEADS, "[qk]_layer", 4 * 2),
    "multi-token prediction": ({"mtp_num_layers": 1}, "eh_proj", 1),
}


def attention_of(model):
    """Names and shapes of the attention's tensors in a checkpoint."""
    return {
        tensor.key: tensor.global_shape
        for entry in nested_values(model.sharded_state_dict())
        for tensor in _sharded_tensors(entry)
        if ".self_attention." in tensor.key
    }


def local_model(config, monkeypatch):
    """The model of megatron-core's own modules."""
    for module in (build, megatron_config):
        monkeypatch.setattr(module, "have_transformer_engine", lambda: False)
    return model_of(config)


@pytest.mark.parametrize("kind", MODELS)
def test_same_seed_gives_the_same_model(kind, monkeypatch):
    model, pattern, count = MODELS[kind]
    config = config_of(
        None, model=model, moe={"layer_freq": [0, 1, 1, 1]}, precision={"dtype": "fp32"}
    )
    theirs = model_of(config)
    found = losses(theirs)
    ours = local_model(config, monkeypatch)
    expected = losses(ours)
    found.sum().backward()
    expected.sum().backward()
    # Initial weights follow from the names in checkpoints.
    assert attention_of(theirs) == attention_of(ours)
    # fp32 and sums in another order.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert compare_gradients(theirs, ours, pattern) == count


WIDE = {
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 16,
    "v_head_dim": 16,
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("norms", [True, False])
def test_every_projection_runs_in_fp8(recipe, norms):
    model = {"qk_layernorm": norms, "latent_attention": WIDE}
    in_bf16 = losses(model_of(config_of(None, model=model)))
    CALLS.clear()
    fp8 = model_of(config_of(recipe, model=model))
    found = losses(fp8)
    found.sum().backward()
    assert {call.recipe for call in CALLS} == {RECIPES[recipe]}
    # Of each of the 4 layers: two compressions, two expansions and the output, and the experts.
    assert len(CALLS) == 4 * (5 + 2), sorted({call.module for call in CALLS})
    # As for other attention: e4m3 rounds by up to 2^-4 of a value.
    assert not torch.equal(found, in_bf16)
    assert (found - in_bf16).abs().mean() < 0.1 * in_bf16.mean()
    assert_gradients(fp8)


@pytest.mark.parametrize(
    "changes",
    [{"q_lora_rank": 24}, {"kv_lora_rank": 24}, {"qk_pos_emb_head_dim": 8}, {"v_head_dim": 4}],
)
def test_widths_that_fp8_cannot_have(changes):
    (name,) = changes
    with config_error(rf"model\.latent_attention\.{name} .* multiple of 16"):
        config_of("tensorwise", model={"latent_attention": WIDE | changes})
