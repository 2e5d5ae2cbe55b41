"""Section `model.latent_attention`: multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from moepp_megatron.config.rows import each, group, refuse, values
from moepp_megatron.config.schema.section import Section, Unit

if TYPE_CHECKING:
    from moepp_megatron.config.schema import Config


def _latent(config: Config) -> LatentAttentionSection:
    section = config.model.latent_attention
    assert section is not None, "asked only within a group of latent attention"
    return section


def _is_not_stretched(config: Config) -> bool:
    """YaRN slows down channels between two numbers of rotations."""
    latent = _latent(config)
    return latent.rope_type == "yarn" and latent.beta_slow >= latent.beta_fast


class LatentAttentionSection(Section):
    """Sizes of the compressed vectors and of the heads, and the rotation of the heads' part.

    Names follow megatron-core's MLATransformerConfig.
    """

    q_lora_rank: Annotated[int | None, Unit("channels", ge=1)] = None
    """Width of the compressed query; null makes queries from the layer's input"""
    kv_lora_rank: Annotated[int, Unit("channels", ge=1)]
    """Width of the compressed vector that keys and values are made of"""
    qk_head_dim: Annotated[int, Unit("channels", ge=1)] = 128
    """Width of a head's query and key without position"""
    qk_pos_emb_head_dim: Annotated[int, Unit("channels", ge=1)] = 64
    """Width of their part with position, whose key all heads share"""
    v_head_dim: Annotated[int, Unit("channels", ge=1)] = 128
    """Width of a head's value"""
    rope_type: Literal["rope", "yarn"] = "rope"
    """Rotary embedding as it is, or stretched to longer sequences (YaRN)"""
    rotary_scaling_factor: Annotated[float, Unit("1", ge=1.0)] = 40.0
    """With yarn: how many times longer sequences are than those trained on before"""
    original_max_position_embeddings: Annotated[int, Unit("tokens", ge=1)] = 4096
    """With yarn: the sequence length trained on before"""
    beta_fast: Annotated[float, Unit("turns", gt=0.0)] = 32.0
    """With yarn: turns in that length from which on channels keep their speed"""
    beta_slow: Annotated[float, Unit("turns", gt=0.0)] = 1.0
    """With yarn: turns in that length up to which channels slow down fully"""
    mscale: Annotated[float, Unit("1", ge=0.0)] = 1.0
    """With yarn: growth of the rotated channels with the logarithm of the factor"""
    mscale_all_dim: Annotated[float, Unit("1", ge=0.0)] = 0.0
    """With yarn: the same of all scores instead of only the rotated channels"""

    @property
    def qk_dim(self) -> int:
        """Width of a head's query and key, both parts."""
        return self.qk_head_dim + self.qk_pos_emb_head_dim

    megatron_flags = (
        "q-lora-rank kv-lora-rank qk-head-dim qk-pos-emb-head-dim v-head-dim rope-type "
        "rotary-scaling-factor original-max-position-embeddings beta-fast beta-slow mscale "
        "mscale-all-dim"
    )
    own_rules = (
        group(
            "model.latent_attention",
            each(
                values("model.num_query_groups model.kv_channels"),
                lambda value: value is not None,
                "must be null with model.latent_attention, which gives every head keys and values "
                "of its own width",
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
                "model.qkv_bias",
                "must be false with model.latent_attention: its projections have no biases",
                "use false, or set model.latent_attention to null",
            ),
            refuse(
                "model.qk_layernorm_scope",
                "not model.qk_layernorm_scope head",
                "must be 'head' with model.latent_attention: its norms are of compressed vectors, "
                "which have no heads",
                "use 'head', or set model.latent_attention to null",
            ),
            # Transformer Engine's checkpoint would have to enter FP8 again for the expansion.
            refuse(
                "training.recompute_modules",
                lambda c: c.precision.fp8 and "mla_up_proj" in c.training.recompute_modules,
                "must not hold mla_up_proj with precision.fp8 ({precision.fp8}): its repetition "
                "has not been tested in FP8",
                "leave mla_up_proj out, or set precision.fp8 to null",
            ),
        ),
        group(
            "not model.latent_attention",
            refuse(
                "training.recompute_modules",
                lambda c: "mla_up_proj" in c.training.recomputed,
                "must not hold mla_up_proj without model.latent_attention",
                "leave mla_up_proj out, or give model.latent_attention",
            ),
        ),
    )
