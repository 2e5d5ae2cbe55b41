"""Section `model`: the decoder around the experts (pre-norm, RMSNorm, SwiGLU, RoPE)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moepp_megatron.config.schema.latent_attention import LatentAttentionSection
from moepp_megatron.config.schema.section import Section, Unit


class ModelSection(Section):
    """Shape of the transformer; names follow megatron-core's TransformerConfig."""

    num_layers: Annotated[int, Unit("layers"), Field(ge=1)]
    """Transformer layers"""
    hidden_size: Annotated[int, Unit("channels"), Field(ge=1)]
    """Width D of the residual stream"""
    ffn_hidden_size: Annotated[int, Unit("channels"), Field(ge=1)]
    """Inner width of an FFN (of an FFN expert too, unless moe.ffn_hidden_size)"""
    num_attention_heads: Annotated[int, Unit("heads"), Field(ge=1)]
    """Query heads"""
    num_query_groups: Annotated[int | None, Unit("heads"), Field(ge=1)] = None
    """Key/value heads (grouped-query attention); null means one per query head"""
    kv_channels: Annotated[int | None, Unit("channels"), Field(ge=1)] = None
    """Width of one head; null means hidden_size / num_attention_heads"""
    qk_layernorm: Annotated[bool, Unit("-")] = False
    """Normalise queries and keys; with latent_attention the compressed vectors that they are made
    of"""
    qk_layernorm_scope: Annotated[Literal["head", "all_heads"], Unit("-")] = "head"
    """Scope of qk_layernorm's mean square: each head, or all heads of a token at once (OLMoE)"""
    qkv_bias: Annotated[bool, Unit("-")] = False
    """Add learned biases to queries, keys and values (Qwen2)"""
    latent_attention: Annotated[LatentAttentionSection | None, Unit("-")] = None
    """Multi-head latent attention; null is multi-head or grouped-query attention"""
    seq_length: Annotated[int, Unit("tokens"), Field(ge=1)]
    """Sequence length"""
    vocab_size: Annotated[int, Unit("tokens"), Field(ge=2)]
    """Rows of the embedding table"""
    rotary_base: Annotated[float, Unit("1"), Field(gt=1.0)] = 10000.0
    """Base of the rotary position embedding"""
    norm_epsilon: Annotated[float, Unit("1"), Field(gt=0.0, le=0.1)] = 1e-5
    """Added to the mean square inside RMSNorm"""
    tie_embeddings: Annotated[bool, Unit("-")] = False
    """Share the weights of the embedding and the output layer"""
    init_method_std: Annotated[float, Unit("1"), Field(gt=0.0, le=1.0)] = 0.02
    """Standard deviation of the initial weights"""

    mtp_num_layers: Annotated[int, Unit("layers"), Field(ge=0, le=16)] = 0
    """Layers of multi-token prediction, each of which predicts one token further; 0: off"""
    mtp_loss_scaling_factor: Annotated[float, Unit("1"), Field(gt=0.0, le=10.0)] = 0.1
    """Weight of the loss of these layers, of all together"""

    @property
    def query_groups(self) -> int:
        """Key/value heads, the default resolved."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Width of one attention head, the default resolved; without latent attention."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads
