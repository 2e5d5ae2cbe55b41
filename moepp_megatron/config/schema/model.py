"""Section `model`: the decoder around the experts (pre-norm, RMSNorm, SwiGLU, RoPE)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moepp_megatron.config.schema.latent_attention import LatentAttentionSection
from moepp_megatron.config.schema.section import Section, unit


class ModelSection(Section):
    """Shape of the transformer; names follow megatron-core's TransformerConfig."""

    num_layers: int = Field(
        ge=1, description="Transformer layers", json_schema_extra=unit("layers")
    )
    hidden_size: int = Field(
        ge=1, description="Width D of the residual stream", json_schema_extra=unit("channels")
    )
    ffn_hidden_size: int = Field(
        ge=1,
        description="Inner width of an FFN (of an FFN expert too, unless moe.ffn_hidden_size)",
        json_schema_extra=unit("channels"),
    )
    num_attention_heads: int = Field(
        ge=1, description="Query heads", json_schema_extra=unit("heads")
    )
    num_query_groups: int | None = Field(
        default=None,
        ge=1,
        description="Key/value heads (grouped-query attention); null means one per query head",
        json_schema_extra=unit("heads"),
    )
    kv_channels: int | None = Field(
        default=None,
        ge=1,
        description="Width of one head; null means hidden_size / num_attention_heads",
        json_schema_extra=unit("channels"),
    )
    qk_layernorm: bool = Field(
        default=False,
        description="Normalise queries and keys; with latent_attention the compressed "
        "vectors that they are made of",
        json_schema_extra=unit("-"),
    )
    qk_layernorm_scope: Literal["head", "all_heads"] = Field(
        default="head",
        description="What qk_layernorm takes the mean square over: each head by itself, or all "
        "heads of a token at once (OLMoE)",
        json_schema_extra=unit("-"),
    )
    qkv_bias: bool = Field(
        default=False,
        description="Add learned biases to queries, keys and values (Qwen2)",
        json_schema_extra=unit("-"),
    )
    latent_attention: LatentAttentionSection | None = Field(
        default=None,
        description="Multi-head latent attention; null is multi-head or grouped-query attention",
        json_schema_extra=unit("-"),
    )
    seq_length: int = Field(ge=1, description="Sequence length", json_schema_extra=unit("tokens"))
    vocab_size: int = Field(
        ge=2, description="Rows of the embedding table", json_schema_extra=unit("tokens")
    )
    rotary_base: float = Field(
        default=10000.0,
        gt=1.0,
        description="Base of the rotary position embedding",
        json_schema_extra=unit("1"),
    )
    norm_epsilon: float = Field(
        default=1e-5,
        gt=0.0,
        le=0.1,
        description="Added to the mean square inside RMSNorm",
        json_schema_extra=unit("1"),
    )
    tie_embeddings: bool = Field(
        default=False,
        description="Share the weights of the embedding and the output layer",
        json_schema_extra=unit("-"),
    )
    init_method_std: float = Field(
        default=0.02,
        gt=0.0,
        le=1.0,
        description="Standard deviation of the initial weights",
        json_schema_extra=unit("1"),
    )

    mtp_num_layers: int = Field(
        default=0,
        ge=0,
        le=16,
        description="Layers of multi-token prediction, each of which predicts one token further; "
        "0: off",
        json_schema_extra=unit("layers"),
    )
    mtp_loss_scaling_factor: float = Field(
        default=0.1,
        gt=0.0,
        le=10.0,
        description="Weight of the loss of these layers, of all together",
        json_schema_extra=unit("1"),
    )

    @property
    def query_groups(self) -> int:
        """Key/value heads, the default resolved."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Width of one attention head, the default resolved; without latent attention."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads
