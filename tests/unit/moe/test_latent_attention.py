"""Latent attention in the model against plain PyTorch: logits and the gradient of every weight."""

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from moepp_megatron.config import count_parameters, parse_config
from moepp_megatron.model.build import build_model
from moepp_megatron.model.local_modules import _LatentDotProductAttention, fit_local_modules
from moepp_megatron.model.megatron_config import moepp_config, transformer_config
from moepp_megatron.moe.spec import get_dense_layer_spec, get_moepp_layer_spec
from tests.unit.moe.latent_reference import decoder_logits

SEQUENCE, BATCH, VOCAB = 12, 2, 64
WIDTHS = {
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 6,
    "v_head_dim": 10,
}
# As in DeepSeek-V3's config.json, but with limits between which these few channels lie.
YARN = {
    "rope_type": "yarn",
    "rotary_scaling_factor": 40.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 8.0,
    "beta_slow": 0.2,
    "mscale": 0.7,
    "mscale_all_dim": 1.3,
}
KINDS = {
    "as DeepSeek-V3": {"qk_layernorm": True, "latent_attention": WIDTHS},
    "no norms": {"latent_attention": WIDTHS},
    "queries from the input": {"latent_attention": WIDTHS | {"q_lora_rank": None}},
    "yarn": {"qk_layernorm": True, "latent_attention": WIDTHS | YARN},
}


def config_of(model, **sections):
    return parse_config(
        {
            "run": {"dir": "runs/none"},
            "model": {
                "num_layers": 3,
                "hidden_size": 32,
                "ffn_hidden_size": 24,
                "num_attention_heads": 3,
                "seq_length": SEQUENCE,
                "vocab_size": VOCAB,
                "init_method_std": 0.2,
            }
            | model,
            "moe": {"num_ffn_experts": 4, "router_topk": 4},
            "optimizer": {"lr": 1e-2},
            "training": {"train_iters": 10, "global_batch_size": 2, "micro_batch_size": 2},
        }
        | sections
    )


@pytest.mark.parametrize("kind", KINDS)
def test_model_equals_plain_pytorch(kind):
    config = config_of(KINDS[kind])
    (model,) = build_model(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                # Not 1, so that a forgotten norm shows.
                parameter.uniform_(0.5, 1.5, generator=generator)
    tokens = torch.randint(VOCAB, (BATCH, SEQUENCE), generator=generator)
    wanted = torch.randint(VOCAB, (BATCH, SEQUENCE), generator=generator)
    weights = {
        name: parameter.detach().clone().requires_grad_()
        for name, parameter in model.named_parameters()
    }

    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    positions = torch.arange(SEQUENCE).expand(BATCH, -1)
    logits = model(tokens, positions, None)
    expected, balance = decoder_logits(config, moepp_config(config), weights, tokens)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())

    F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum").backward()
    loss = F.cross_entropy(expected.flatten(0, 1), wanted.flatten(), reduction="sum")
    (loss + config.moe.balance_coeff * balance * tokens.numel()).backward()
    for name, parameter in model.named_parameters():
        gradient = weights[name].grad
        assert gradient is not None, name
        assert gradient.abs().max() > 0, f"{name} has no gradient"
        limit = 1e-5 * gradient.abs().max().item()
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=limit, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_counted(kind):
    config = config_of(KINDS[kind])
    (model,) = build_model(config)
    counts = count_parameters(config)
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())
    attention = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if ".self_attention." in name
    )
    assert counts.attention == attention


def test_layers_of_megatrons_own_latent_attention_are_refused():
    """Whatever else is exchanged in them, and whether they have experts or not."""
    config = config_of(KINDS["no norms"])
    megatron, moepp = transformer_config(config), moepp_config(config)
    for build in (get_moepp_layer_spec, get_dense_layer_spec):
        for adapt in (None, lambda _, spec, is_moe: spec):
            with pytest.raises(ValueError, match=r"multi_latent_attention \(True\).*fit_local_mod"):
                build(megatron, moepp, use_transformer_engine=False, adapt=adapt)
        build(megatron, moepp, use_transformer_engine=False, adapt=fit_local_modules)


def test_width_of_values_that_the_core_does_not_know_is_refused():
    config = transformer_config(config_of(KINDS["no norms"]))
    with pytest.raises(
        ValueError, match=r"v_head_dim \(12\) must be TransformerConfig.kv_channels"
    ):
        _LatentDotProductAttention(
            config=config,
            layer_number=1,
            attn_mask_type=AttnMaskType.causal,
            attention_type="self",
            v_channels=12,
        )
