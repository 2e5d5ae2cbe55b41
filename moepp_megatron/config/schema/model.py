"""Section `model`: the decoder around the experts (pre-norm, RMSNorm, SwiGLU, RoPE)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from moepp_megatron.config.rows import divisible, first, group, refuse, table
from moepp_megatron.config.schema.latent_attention import LatentAttentionSection
from moepp_megatron.config.schema.section import Section, Unit

if TYPE_CHECKING:
    from moepp_megatron.config.schema import Config


def _fitting_groups(config: Config) -> str:
    heads = config.model.num_attention_heads
    fitting = [str(count) for count in range(1, heads + 1) if heads % count == 0]
    return f"use one of {', '.join(fitting)}"


def _wider_heads(config: Config) -> str:
    model = config.model
    width = (model.head_dim + 1) * model.num_attention_heads
    return f"use {width} or set model.kv_channels to an even number"


class EngineModelSection(Section):
    """Shape of the transformer; names follow megatron-core's TransformerConfig."""

    num_layers: Annotated[int, Unit("layers", ge=1)]
    """Transformer layers"""
    hidden_size: Annotated[int, Unit("channels", ge=1)]
    """Width D of the residual stream"""
    ffn_hidden_size: Annotated[int, Unit("channels", ge=1)]
    """Inner width of an FFN (of an FFN expert too, unless moe.ffn_hidden_size)"""
    num_attention_heads: Annotated[int, Unit("heads", ge=1)]
    """Query heads"""
    num_query_groups: Annotated[int | None, Unit("heads", ge=1)] = None
    """Key/value heads (grouped-query attention); null means one per query head"""
    kv_channels: Annotated[int | None, Unit("channels", ge=1)] = None
    """Width of one head; null means hidden_size / num_attention_heads"""
    qk_layernorm: bool = False
    """Normalise queries and keys; with latent_attention the compressed vectors that they are made
    of"""
    qk_layernorm_scope: Literal["head", "all_heads"] = "head"
    """Scope of qk_layernorm's mean square: each head, or all heads of a token at once (OLMoE)"""
    qkv_bias: bool = False
    """Add learned biases to queries, keys and values (Qwen2)"""
    latent_attention: LatentAttentionSection | None = None
    """Multi-head latent attention; null is multi-head or grouped-query attention"""
    seq_length: Annotated[int, Unit("tokens", ge=1)]
    """Sequence length"""
    vocab_size: Annotated[int, Unit("tokens", ge=2)]
    """Rows of the embedding table"""
    rotary_base: Annotated[float, Unit("1", gt=1.0)] = 10000.0
    """Base of the rotary position embedding"""
    norm_epsilon: Annotated[float, Unit("1", gt=0.0, le=0.1)] = 1e-5
    """Added to the mean square inside RMSNorm"""
    tie_embeddings: bool = False
    """Share the weights of the embedding and the output layer"""
    init_method_std: Annotated[float, Unit("1", gt=0.0, le=1.0)] = 0.02
    """Standard deviation of the initial weights"""

    @property
    def query_groups(self) -> int:
        """Key/value heads, the default resolved."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Width of one attention head, the default resolved; without latent attention."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    engine_defaults = {"mtp_num_layers": 0}
    megatron_flags: ClassVar[str] = (
        "num-layers hidden-size ffn-hidden-size num-attention-heads num-query-groups "
        "kv-channels seq-length vocab-size padded-vocab-size=vocab_size rotary-base "
        "norm-epsilon layernorm-epsilon=norm_epsilon init-method-std qk-layernorm:true "
        "add-qkv-bias=qkv_bias:true untie-embeddings-and-output-weights=tie_embeddings:false"
    )
    own_rules = table(
        group(
            "not model.latent_attention and not model.kv_channels",
            first(
                divisible(
                    "model.hidden_size",
                    lambda c: c.model.num_attention_heads,
                    "model.num_attention_heads ({model.num_attention_heads}) unless "
                    "model.kv_channels is set",
                ),
                refuse(
                    "model.hidden_size",
                    lambda c: c.model.head_dim % 2,
                    "must give heads of even width for rotary embeddings, and hidden_size / "
                    "num_attention_heads is {model.head_dim}",
                    _wider_heads,
                ),
            ),
        ),
        group(
            "not model.latent_attention and model.kv_channels",
            refuse(
                "model.kv_channels",
                lambda c: c.model.head_dim % 2,
                "must be even, because rotary embeddings turn channels in pairs",
                lambda c: f"use {c.model.head_dim + 1}",
            ),
        ),
        refuse(
            "model.num_query_groups",
            lambda c: c.model.num_attention_heads % c.model.query_groups,
            "must divide model.num_attention_heads ({model.num_attention_heads})",
            _fitting_groups,
        ),
        refuse(
            "model.qk_layernorm_scope",
            "model.qk_layernorm_scope all_heads and not model.qk_layernorm",
            "must be 'head' without model.qk_layernorm, which has the norms that it describes",
            "use 'head', or set model.qk_layernorm to true",
        ),
    )
    removed = {"implementation": ("gpt", "leave it out: the weights are those of a GPTModel")}
