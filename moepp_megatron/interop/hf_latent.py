"""DeepSeek-V3: its configuration, and the tensors of its latent attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moepp_megatron.config import Config, ConfigError
from moepp_megatron.interop.hf_decoder import decoder_section, refuse_fields, require, rope_theta
from moepp_megatron.interop.tensor_rules import TensorRule, same

# What DeepSeek's and transformers' code adds to mean squares in the norms of latent attention.
_LATENT_EPSILON = 1e-6
# Scores of a group that transformers' and DeepSeek's code add up to rank it.
_RANKED_PER_GROUP = 2


def deepseek_decoder_section(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Our `model` section of a DeepSeek-V3 model.

    ConfigError if this package's decoder lacks a feature, or a field is missing.
    """
    norms = "all norms of this package's decoder add the same, and those of latent attention 1e-6"
    epsilon, paired = hf.get("rms_norm_eps", _LATENT_EPSILON), hf.get("rope_interleave", True)
    quantized = hf.get("quantization_config")
    rows = (
        ("quantization_config", quantized, None, "convert the weights to bf16 first"),
        ("rope_interleave", paired, True, "pairs of channels are rotated"),
        ("rms_norm_eps", epsilon, _LATENT_EPSILON, norms),
    )
    refuse_fields(rows)
    plain = {key: hf[key] for key in hf if key not in ("kv_lora_rank", "head_dim", "rope_scaling")}
    plain |= {"rope_parameters": {"rope_theta": rope_theta(hf)}, "qk_norm": True}
    section = decoder_section(plain)
    del section["num_query_groups"]
    latent = {
        "q_lora_rank": hf.get("q_lora_rank"),
        "kv_lora_rank": require(hf, "kv_lora_rank"),
        "qk_head_dim": require(hf, "qk_nope_head_dim"),
        "qk_pos_emb_head_dim": require(hf, "qk_rope_head_dim"),
        "v_head_dim": require(hf, "v_head_dim"),
    }
    if latent["q_lora_rank"] is None:
        raise ConfigError(
            "config.json: q_lora_rank (null) must be a width: without compressed queries "
            "megatron-core normalises no compressed keys either; such a checkpoint cannot be "
            "converted"
        )
    return section | {"latent_attention": latent | _rotation(hf)}


def _rotation(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding, from transformers 5's field or the older one."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return {"rope_type": "rope"}
    if kind != "yarn":
        raise ConfigError(
            f"config.json: rope_type ({kind}) must be default or yarn; such a checkpoint cannot be "
            "converted"
        )
    return {
        "rope_type": "yarn",
        "rotary_scaling_factor": float(require(rope, "factor")),
        "original_max_position_embeddings": require(rope, "original_max_position_embeddings"),
        "beta_fast": float(rope.get("beta_fast") or 32.0),
        "beta_slow": float(rope.get("beta_slow") or 1.0),
        "mscale": float(rope.get("mscale") or 1.0),
        "mscale_all_dim": float(rope.get("mscale_all_dim") or 0.0),
    }


def deepseek_moe(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of our `moe` section of a DeepSeek-V3 model; ConfigError for other routing."""
    groups, kept = hf.get("n_group") or 1, hf.get("topk_group") or 1
    topk = require(hf, "num_experts_per_tok")
    if kept < groups and topk // kept != _RANKED_PER_GROUP:
        raise ConfigError(
            f"config.json: topk_group ({kept}) must be such that num_experts_per_tok ({topk}) "
            f"divided by it and rounded down is {_RANKED_PER_GROUP}: DeepSeek-V3's code adds up "
            "that many scores of a group whatever the numbers, this package's as many as the "
            "paper says; such a checkpoint cannot be upcycled exactly"
        )
    rows = (
        ("scoring_func", hf.get("scoring_func", "sigmoid"), "sigmoid", "DeepSeek-V3's scores"),
        ("norm_topk_prob", hf.get("norm_topk_prob", True), True, "gates are shares of their sum"),
        ("moe_layer_freq", hf.get("moe_layer_freq", 1), 1, "every layer behind the dense ones"),
    )
    refuse_fields(rows, "upcycled exactly")
    width, shared = require(hf, "moe_intermediate_size"), hf.get("n_shared_experts") or 0
    dense, layers = hf.get("first_k_dense_replace") or 0, require(hf, "num_hidden_layers")
    return {
        "num_ffn_experts": require(hf, "n_routed_experts"),
        "router_topk": topk,
        "num_groups": groups if kept < groups else 1,
        "group_topk": kept if kept < groups else 1,
        "score_function": "sigmoid",
        "gate_scale": float(hf.get("routed_scaling_factor", 1.0)),
        "ffn_hidden_size": width,
        "shared_expert_ffn_hidden_size": shared * width or None,
        "layer_freq": [int(layer >= dense) for layer in range(layers)],
    }


def deepseek_attention(config: Config, layer: int, is_moe: bool) -> Iterator[TensorRule]:
    """Attention and both norms of a layer with multi-head latent attention."""
    model, latent = config.model, config.model.latent_attention
    assert latent is not None, "the model has another attention"
    assert latent.q_lora_rank is not None, "queries that are not compressed were refused"
    ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
    # As in `moepp_megatron.model.latent_attention`.
    ffn_norm = "pre_mlp_layernorm.weight" if is_moe else "mlp.linear_fc1.layer_norm_weight"
    width, heads = model.hidden_size, model.num_attention_heads
    yield same(ours + "input_layernorm.weight", theirs + "input_layernorm.weight", width)
    yield same(ours + ffn_norm, theirs + "post_attention_layernorm.weight", width)
    ours, theirs = ours + "self_attention.linear_", theirs + "self_attn."
    rank = latent.q_lora_rank
    yield same(ours + "q_down_proj.weight", theirs + "q_a_proj.weight", rank, width)
    yield same(ours + "q_up_proj.layer_norm_weight", theirs + "q_a_layernorm.weight", rank)
    queries = heads * latent.qk_dim
    yield same(ours + "q_up_proj.weight", theirs + "q_b_proj.weight", queries, rank)
    rank = latent.kv_lora_rank
    rows = rank + latent.qk_pos_emb_head_dim
    yield same(ours + "kv_down_proj.weight", theirs + "kv_a_proj_with_mqa.weight", rows, width)
    yield same(ours + "kv_up_proj.layer_norm_weight", theirs + "kv_a_layernorm.weight", rank)
    rows = heads * (latent.qk_head_dim + latent.v_head_dim)
    yield same(ours + "kv_up_proj.weight", theirs + "kv_b_proj.weight", rows, rank)
    columns = heads * latent.v_head_dim
    yield same(ours + "proj.weight", theirs + "o_proj.weight", width, columns)
