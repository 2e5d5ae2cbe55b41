"""Section `model.latent_attention`: multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moepp_megatron.config.schema.section import Section, unit


class LatentAttentionSection(Section):
    """Sizes of the compressed vectors and of the heads, and the rotation of the heads' part.

    Names follow megatron-core's MLATransformerConfig.
    """

    q_lora_rank: int | None = Field(
        default=None,
        ge=1,
        description="Width of the compressed query; null makes queries from the layer's input",
        json_schema_extra=unit("channels"),
    )
    kv_lora_rank: int = Field(
        ge=1,
        description="Width of the compressed vector that keys and values are made of",
        json_schema_extra=unit("channels"),
    )
    qk_head_dim: int = Field(
        default=128,
        ge=1,
        description="Width of a head's query and key without position",
        json_schema_extra=unit("channels"),
    )
    qk_pos_emb_head_dim: int = Field(
        default=64,
        ge=1,
        description="Width of their part with position, whose key all heads share",
        json_schema_extra=unit("channels"),
    )
    v_head_dim: int = Field(
        default=128, ge=1, description="Width of a head's value", json_schema_extra=unit("channels")
    )
    rope_type: Literal["rope", "yarn"] = Field(
        default="rope",
        description="Rotary embedding as it is, or stretched to longer sequences (YaRN)",
        json_schema_extra=unit("-"),
    )
    rotary_scaling_factor: float = Field(
        default=40.0,
        ge=1.0,
        description="With yarn: how many times longer sequences are than those trained on before",
        json_schema_extra=unit("1"),
    )
    original_max_position_embeddings: int = Field(
        default=4096,
        ge=1,
        description="With yarn: the sequence length trained on before",
        json_schema_extra=unit("tokens"),
    )
    beta_fast: float = Field(
        default=32.0,
        gt=0.0,
        description="With yarn: turns in that length from which on channels keep their speed",
        json_schema_extra=unit("turns"),
    )
    beta_slow: float = Field(
        default=1.0,
        gt=0.0,
        description="With yarn: turns in that length up to which channels slow down fully",
        json_schema_extra=unit("turns"),
    )
    mscale: float = Field(
        default=1.0,
        ge=0.0,
        description="With yarn: growth of the rotated channels with the logarithm of the factor",
        json_schema_extra=unit("1"),
    )
    mscale_all_dim: float = Field(
        default=0.0,
        ge=0.0,
        description="With yarn: the same of all scores instead of the rotated channels alone",
        json_schema_extra=unit("1"),
    )

    @property
    def qk_dim(self) -> int:
        """Width of a head's query and key, both parts."""
        return self.qk_head_dim + self.qk_pos_emb_head_dim
