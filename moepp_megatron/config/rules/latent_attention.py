"""Rules of `model.latent_attention`: settings that it replaces or excludes."""

from __future__ import annotations

from moepp_megatron.config.rows import Rule, each, group, refuse, values
from moepp_megatron.config.schema import Config, LatentAttentionSection


def _latent(config: Config) -> LatentAttentionSection:
    section = config.model.latent_attention
    assert section is not None, "asked only within a group of latent attention"
    return section


def _is_not_stretched(config: Config) -> bool:
    """YaRN slows down channels between two numbers of rotations."""
    latent = _latent(config)
    return latent.rope_type == "yarn" and latent.beta_slow >= latent.beta_fast


def _recomputes_expansion(config: Config) -> bool:
    return "mla_up_proj" in config.training.recompute_modules


RULES: tuple[Rule, ...] = (
    group(
        lambda c: c.model.latent_attention is not None,
        each(
            values("model.num_query_groups model.kv_channels"),
            lambda value: value is not None,
            "must be null with model.latent_attention, which gives every head keys and values of "
            "its own width",
            "leave {name} out, or set model.latent_attention to null",
        ),
        refuse(
            "model.latent_attention.qk_pos_emb_head_dim",
            lambda c: _latent(c).qk_pos_emb_head_dim % 2,
            "must be even, because rotary embeddings turn channels in pairs",
            lambda c: f"use {_latent(c).qk_pos_emb_head_dim + 1}",
        ),
        # megatron-core normalises both compressed vectors or neither (`QKNormConfigResolver`).
        refuse(
            "model.qk_layernorm",
            lambda c: c.model.qk_layernorm and _latent(c).q_lora_rank is None,
            "must be false with model.latent_attention.q_lora_rank null: megatron-core "
            "normalises the compressed queries and keys together, and would normalise the "
            "layer's input twice instead",
            "use false, or give model.latent_attention.q_lora_rank",
        ),
        refuse(
            "model.latent_attention.beta_slow",
            _is_not_stretched,
            "must be less than model.latent_attention.beta_fast "
            "({model.latent_attention.beta_fast})",
            "use 1.0 and 32.0",
        ),
        refuse(
            "model.qkv_bias",
            lambda c: c.model.qkv_bias,
            "must be false with model.latent_attention: its projections have no biases",
            "use false, or set model.latent_attention to null",
        ),
        refuse(
            "model.qk_layernorm_scope",
            lambda c: c.model.qk_layernorm_scope != "head",
            "must be 'head' with model.latent_attention: its norms are of compressed vectors, "
            "which have no heads",
            "use 'head', or set model.latent_attention to null",
        ),
        # Transformer Engine's checkpoint would have to enter FP8 again for the expansion.
        refuse(
            "training.recompute_modules",
            lambda c: c.precision.fp8 is not None and _recomputes_expansion(c),
            "must not hold mla_up_proj with precision.fp8 ({precision.fp8}): its repetition has "
            "not been tested in FP8",
            "leave mla_up_proj out, or set precision.fp8 to null",
        ),
    ),
    group(
        lambda c: c.model.latent_attention is None,
        refuse(
            "training.recompute_modules",
            lambda c: c.training.recompute_granularity == "selective" and _recomputes_expansion(c),
            "must not hold mla_up_proj without model.latent_attention",
            "leave mla_up_proj out, or give model.latent_attention",
        ),
    ),
)
