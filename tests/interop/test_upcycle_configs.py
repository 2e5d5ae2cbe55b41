"""`configs/upcycle/`: the shapes are those of what `moepp convert upcycle` makes."""

import pytest

from moepp_megatron.config import load_config
from moepp_megatron.interop.upcycle import Additions, _upcycled_config
from moepp_megatron.training.checkpoint.compatible import check_compatible
from tests import ROOT

CONFIGS = ROOT / "configs/upcycle"
# config.json of mistralai/Mixtral-8x7B-v0.1 and Qwen/Qwen3-30B-A3B: what decides shapes.
MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
QWEN3 = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
SOURCES = {"mixtral_8x7b_8_4": (MIXTRAL, 2), "qwen3_30b_a3b_128_32": (QWEN3, 30)}


def made_of(name):
    hf, constants = SOURCES[name]
    return _upcycled_config(hf, Additions(num_constant_experts=constants), name, "bf16")


def test_every_configuration_has_its_source():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {"_recipe", *SOURCES}


@pytest.mark.parametrize("name", SOURCES)
def test_a_configuration_is_that_of_its_checkpoint(name, tmp_path):
    made, shipped = made_of(name), load_config(CONFIGS / f"{name}.yaml")
    (tmp_path / "config.yaml").write_text(made.to_yaml())
    check_compatible(tmp_path, shipped)
    # What shapes do not show, and would make another function of the same weights.
    assert shipped.moe.selection_bias
    for section, keys in (
        ("model", ("norm_epsilon", "rotary_base", "qk_layernorm_scope")),
        ("moe", ("gate_normalization", "score_function", "gate_scale", "router_topk", "tau")),
    ):
        for key in keys:
            value = getattr(getattr(shipped, section), key)
            assert value == getattr(getattr(made, section), key), key


@pytest.mark.parametrize("name", SOURCES)
def test_the_share_falls_from_the_sources_to_phi(name):
    moe = load_config(CONFIGS / f"{name}.yaml").moe
    budget = moe.budget
    assert budget.held_by == "bias"
    assert budget.gain is None
    assert budget.start_ffn_per_token == moe.router_topk
    assert budget.ramp_steps == load_config(CONFIGS / f"{name}.yaml").training.train_iters // 4
    without = made_of(name).moe.ffn_share
    assert budget.target_ffn_per_token == pytest.approx(without * moe.router_topk)
