"""Section `model.latent_attention`: multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moepp_megatron.config.schema.section import Section, Unit


class LatentAttentionSection(Section):
    """Sizes of the compressed vectors and of the heads, and the rotation of the heads' part.

    Names follow megatron-core's MLATransformerConfig.
    """

    q_lora_rank: Annotated[int | None, Unit("channels"), Field(ge=1)] = None
    """Width of the compressed query; null makes queries from the layer's input"""
    kv_lora_rank: Annotated[int, Unit("channels"), Field(ge=1)]
    """Width of the compressed vector that keys and values are made of"""
    qk_head_dim: Annotated[int, Unit("channels"), Field(ge=1)] = 128
    """Width of a head's query and key without position"""
    qk_pos_emb_head_dim: Annotated[int, Unit("channels"), Field(ge=1)] = 64
    """Width of their part with position, whose key all heads share"""
    v_head_dim: Annotated[int, Unit("channels"), Field(ge=1)] = 128
    """Width of a head's value"""
    rope_type: Annotated[Literal["rope", "yarn"], Unit("-")] = "rope"
    """Rotary embedding as it is, or stretched to longer sequences (YaRN)"""
    rotary_scaling_factor: Annotated[float, Unit("1"), Field(ge=1.0)] = 40.0
    """With yarn: how many times longer sequences are than those trained on before"""
    original_max_position_embeddings: Annotated[int, Unit("tokens"), Field(ge=1)] = 4096
    """With yarn: the sequence length trained on before"""
    beta_fast: Annotated[float, Unit("turns"), Field(gt=0.0)] = 32.0
    """With yarn: turns in that length from which on channels keep their speed"""
    beta_slow: Annotated[float, Unit("turns"), Field(gt=0.0)] = 1.0
    """With yarn: turns in that length up to which channels slow down fully"""
    mscale: Annotated[float, Unit("1"), Field(ge=0.0)] = 1.0
    """With yarn: growth of the rotated channels with the logarithm of the factor"""
    mscale_all_dim: Annotated[float, Unit("1"), Field(ge=0.0)] = 0.0
    """With yarn: the same of all scores instead of only the rotated channels"""

    @property
    def qk_dim(self) -> int:
        """Width of a head's query and key, both parts."""
        return self.qk_head_dim + self.qk_pos_emb_head_dim
