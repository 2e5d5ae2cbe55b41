"""A layer's attention in the cost model: matrix products and sizes of one rank."""

from __future__ import annotations

from dataclasses import dataclass

from moepp_megatron.config import Config


@dataclass(frozen=True)
class _Matmul:
    """A weight [outputs, inputs] of one rank and the tokens that it sees."""

    outputs: int  # rows of the weight on this rank
    inputs: int  # columns of the weight on this rank
    # Whether it is whole on every tensor-parallel rank and sees the rank's own share of a sequence.
    is_sequence_parallel: bool = False
    is_up_projection: bool = False  # whether it expands a compressed vector (`mla_up_proj`)


@dataclass(frozen=True)
class GroupedQuery:
    """Grouped-query attention (arXiv 2305.13245). Sizes are of one tensor-parallel rank of `tp`."""

    heads: int  # query heads
    groups: int  # key/value heads
    head_dim: int  # width of a head
    has_qk_norm: bool = False  # RMSNorm of queries and keys
    has_bias: bool = False  # queries, keys and values have biases
    norm_spans_heads: bool = False  # the norms are over all heads at once, not per head

    @property
    def qk_dim(self) -> int:
        """Width of a query and of a key of one head."""
        return self.head_dim

    @property
    def v_dim(self) -> int:
        """Width of a value of one head."""
        return self.head_dim

    def matmuls(self, hidden: int, tp: int) -> tuple[_Matmul, ...]:
        """One product for queries, keys and values, one for the output."""
        return _Matmul(self._projected(tp), hidden), _Matmul(hidden, self._query(tp))

    def norm_parameters(self) -> int:
        """Weights of the query and key norms, whole on every rank."""
        heads = self.heads + self.groups if self.norm_spans_heads else 2
        return heads * self.head_dim if self.has_qk_norm else 0

    def bias_parameters(self, tp: int) -> int:
        """Biases of the queries, keys and values of this rank's heads."""
        return self._projected(tp) if self.has_bias else 0

    def gathered_width(self, hidden: int) -> int:
        """Channels per token that ranks gather before the projections: the layer's input."""
        return hidden

    def kept_width(self, tp: int) -> int:
        """Channels kept for the backward pass: queries, keys, values, output, and before norms."""
        # The norms keep copies: of the projection queries and keys are views with gaps.
        normed = self._query(tp) + self._key(tp) if self.has_qk_norm else 0
        return 2 * self._query(tp) + 2 * self._key(tp) + normed

    def exchanged_width(self, tp: int) -> int:
        """Channels per token of the keys and values that context-parallel ranks exchange."""
        return 2 * self._key(tp)

    def _projected(self, tp: int) -> int:
        """Rows of this rank's projection of queries, keys and values."""
        # Also with fewer key/value heads than ranks each projects its share of all rows: ranks
        # gather the rows of the heads that they share.
        return (self.heads + 2 * self.groups) * self.head_dim // tp

    def _query(self, tp: int) -> int:
        return self.heads // tp * self.head_dim

    def _key(self, tp: int) -> int:
        # With fewer key/value heads than ranks, ranks share one.
        return max(self.groups // tp, 1) * self.head_dim


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (arXiv 2405.04434, section 2.1), sizes as in `GroupedQuery`.

    With Transformer Engine's modules, compressions are whole on every tensor-parallel rank and see
    its own tokens; their results are gathered, expansions are split over the ranks.
    """

    heads: int
    query_rank: int | None  # width of the compressed query; None where queries come from the input
    key_rank: int  # width of the compressed keys and values
    plain_dim: int  # width of a head's query and key without position
    rotary_dim: int  # width of the part with position, shared by all heads' keys
    v_dim: int  # width of a value
    has_norms: bool = True  # the compressed vectors are normalised
    # Compressions are split over the ranks and see all tokens, as megatron-core's local modules do
    # it (a rank built without Transformer Engine).
    splits_compressions: bool = False

    @property
    def qk_dim(self) -> int:
        """Width of a query and of a key of one head."""
        return self.plain_dim + self.rotary_dim

    def matmuls(self, hidden: int, tp: int) -> tuple[_Matmul, ...]:
        """Compressions and expansions of queries and of keys and values, the output."""
        heads = self.heads // tp
        queries, keys = heads * self.qk_dim, heads * (self.plain_dim + self.v_dim)
        compressed = self._compression(self.key_rank + self.rotary_dim, hidden, tp)
        expanded = _Matmul(keys, self.key_rank, is_up_projection=True)
        output = _Matmul(hidden, heads * self.v_dim)
        if self.query_rank is None:
            query = _Matmul(queries, hidden, is_up_projection=True)
            return query, compressed, expanded, output
        down = self._compression(self.query_rank, hidden, tp)
        up = _Matmul(queries, self.query_rank, is_up_projection=True)
        return down, compressed, up, expanded, output

    def _compression(self, width: int, hidden: int, tp: int) -> _Matmul:
        if self.splits_compressions:
            return _Matmul(width // tp, hidden)
        return _Matmul(width, hidden, is_sequence_parallel=True)

    def norm_parameters(self) -> int:
        """Norms of the compressed vectors."""
        return (self.query_rank or 0) + self.key_rank if self.has_norms else 0

    def bias_parameters(self, tp: int) -> int:
        """Parameters of biases: none."""
        return 0

    def gathered_width(self, hidden: int) -> int:
        """The compressed vectors, the input in place of a query that is not compressed."""
        queries = hidden if self.query_rank is None else self.query_rank
        return queries + self.key_rank + self.rotary_dim

    def kept_width(self, tp: int) -> int:
        """Queries, keys, values, output of the core, and the compressed vectors."""
        heads_width = self.heads // tp * (2 * self.qk_dim + 2 * self.v_dim)
        return heads_width + self.gathered_width(0)

    def exchanged_width(self, tp: int) -> int:
        """Keys and values."""
        return self.heads // tp * (self.qk_dim + self.v_dim)


Attention = GroupedQuery | LatentAttention


def attention_of(config: Config) -> Attention:
    """The attention that `config` describes, with Transformer Engine's modules."""
    model, latent = config.model, config.model.latent_attention
    if latent is not None:
        return LatentAttention(
            heads=model.num_attention_heads,
            query_rank=latent.q_lora_rank,
            key_rank=latent.kv_lora_rank,
            plain_dim=latent.qk_head_dim,
            rotary_dim=latent.qk_pos_emb_head_dim,
            v_dim=latent.v_head_dim,
            has_norms=model.qk_layernorm,
        )
    return GroupedQuery(
        model.num_attention_heads,
        model.query_groups,
        model.head_dim,
        model.qk_layernorm,
        model.qkv_bias,
        model.qk_layernorm_scope == "all_heads",
    )
