"""ZEDA's format: Qwen3-MoE extended by zero experts (`zce_nums`, `zce_types`).

It has neither constant experts nor gating residuals, and one rule for the gates.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moepp_megatron.config import Config, ConfigError
from moepp_megatron.interop.hf_config import own_hf_config, shared_fields
from moepp_megatron.interop.longcat import UNKNOWN_THERE
from moepp_megatron.interop.tensor_rules import (
    TensorRule,
    attention_rules,
    decoder_rules,
    dense_mlp_rules,
    expert_rules,
    same,
)

_ZEDA = (
    *UNKNOWN_THERE,
    ("num_copy_experts", 0, "ZEDA's Qwen3 has zero experts"),
    ("gate_normalization", "selected", "ZEDA divides by the sum over all picks"),
    ("selection_bias", False, "Qwen3-MoE has no selection bias"),
    ("gate_scale", 1.0, "Qwen3-MoE does not scale gates"),
    ("shared_expert_ffn_hidden_size", None, "Qwen3-MoE has no shared expert"),
)


def zeda_hf_config(config: Config) -> dict[str, Any]:
    """A Qwen3-MoE `config.json` with ZEDA's fields for zero experts.

    ConfigError if Qwen3-MoE with zero experts cannot express the model.
    """
    _refuse(config)
    model, moe = config.model, config.moe
    if not model.qk_layernorm:
        raise ConfigError(
            "model.qk_layernorm (false) must be true for --layout zeda: Qwen3 normalises queries "
            "and keys; use --layout moepp"
        )
    if model.qk_layernorm_scope != "head":
        raise ConfigError(
            f"model.qk_layernorm_scope ({model.qk_layernorm_scope}) must be head for --layout "
            "zeda: Qwen3 normalises each head by itself; use --layout moepp"
        )
    if model.qkv_bias:
        raise ConfigError(
            "model.qkv_bias (true) must be false for --layout zeda: Qwen3 has no biases; use "
            "--layout moepp"
        )
    pattern = moe.moe_layer_pattern(model.num_layers)
    fields = own_hf_config(config) | shared_fields(config)
    kept = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads hidden_act max_position_embeddings initializer_range rms_norm_eps "
        "tie_word_embeddings rope_theta rope_scaling moe_intermediate_size num_experts_per_tok "
        "head_dim"
    )
    return {key: fields[key] for key in kept.split()} | {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": moe.num_ffn_experts,
        "zce_nums": [moe.num_zero_experts],
        "zce_types": ["zero"],
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, is_moe in enumerate(pattern) if not is_moe],
    }


def qwen3_moe_rules(config: Config) -> Iterator[TensorRule]:
    """Qwen3-MoE's names for every tensor; the gate has a row for each zero expert too."""
    width = config.model.hidden_size
    yield from decoder_rules(config)
    for layer, is_moe in enumerate(config.moe.moe_layer_pattern(config.model.num_layers)):
        yield from attention_rules(config, layer)
        if not is_moe:
            yield from dense_mlp_rules(config, layer)
            continue
        ours, theirs = f"decoder.layers.{layer}.mlp.", f"model.layers.{layer}.mlp."
        yield same(ours + "router.weight", theirs + "gate.weight", config.moe.num_experts, width)
        yield from expert_rules(config, layer)


def _refuse(config: Config) -> None:
    problems = [
        f"moe.{name} ({getattr(config.moe, name)}) must be {wanted} for --layout zeda: "
        f"{reason}; use --layout moepp"
        for name, wanted, reason in _ZEDA
        if getattr(config.moe, name) != wanted
    ]
    if problems:
        raise ConfigError("\n".join(problems))
