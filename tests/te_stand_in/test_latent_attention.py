"""Latent attention of Transformer Engine's modules is that of megatron-core's own."""

from __future__ import annotations

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values

from moepp_megatron.config import Config
from moepp_megatron.model import build, megatron_config
from moepp_megatron.model.initialize import sharded_tensors
from tests.te_stand_in.models import config_of, losses, model_of

LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 6,
}
MODELS = {
    "compressed": {"qk_layernorm": True, "latent_attention": LATENT},
    "no norms": {"latent_attention": LATENT},
    "queries from the input": {"latent_attention": LATENT | {"q_lora_rank": None}},
}


def attention_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the attention's tensors in a checkpoint."""
    return {
        tensor.key: tensor.global_shape
        for entry in nested_values(model.sharded_state_dict())
        for tensor in sharded_tensors(entry)
        if ".self_attention." in tensor.key
    }


def local_model(config: Config, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """The model of megatron-core's own modules."""
    for module in (build, megatron_config):
        monkeypatch.setattr(module, "have_transformer_engine", lambda: False)
    return model_of(config)


@pytest.mark.parametrize("kind", MODELS)
def test_same_seed_gives_the_same_model(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(
        None,
        model=MODELS[kind],
        moe={"layer_freq": [0, 1, 1, 1]},
        precision={"dtype": "fp32"},
    )
    theirs = model_of(config)
    found = losses(theirs)
    found.sum().backward()
    ours = local_model(config, monkeypatch)
    expected = losses(ours)
    expected.sum().backward()
    # Initial weights follow from the names in checkpoints.
    assert attention_of(theirs) == attention_of(ours)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    compared = 0
    for name, parameter in ours.named_parameters():
        if ".self_attention." in name and "norm" not in name:
            limit = 1e-5 * parameter.grad.abs().max().item()
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=limit)
            compared += 1
    assert compared == config.model.num_layers * (4 if "input" in kind else 5)
