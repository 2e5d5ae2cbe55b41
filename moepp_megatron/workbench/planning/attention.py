"""A layer's attention in the cost model: matrix products and sizes of one rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from moepp_megatron.config import Config
from moepp_megatron.workbench.planning.latent_attention import LatentAttention
from moepp_megatron.workbench.planning.matmul import Matmul, NamedShape


class Attention(Protocol):
    """A kind of attention. Sizes are of one tensor-parallel rank of `tp`."""

    @property
    def heads(self) -> int:
        """Query heads of the whole layer."""

    @property
    def qk_dim(self) -> int:
        """Width of a query and of a key of one head."""

    @property
    def v_dim(self) -> int:
        """Width of a value of one head."""

    def matmuls(self, hidden: int, tp: int) -> tuple[Matmul, ...]:
        """The projections, the output projection last."""

    def named_shapes(self, hidden: int, tp: int) -> tuple[NamedShape, ...]:
        """Shapes of the parameters by patterns of their names, the first that fits decides."""

    def norm_parameters(self) -> int:
        """Parameters of norms inside the attention, whole on every rank."""

    def bias_parameters(self, tp: int) -> int:
        """Parameters of biases on a rank."""

    def gathered_width(self, hidden: int) -> int:
        """Channels per token that tensor-parallel ranks gather before the projections."""

    def kept_width(self, tp: int) -> int:
        """Channels per token kept for the backward pass by the core (q, k, v, output) and norms."""

    def exchanged_width(self, tp: int) -> int:
        """Channels per token of the keys and values that context-parallel ranks exchange."""


@dataclass(frozen=True)
class GroupedQuery:
    """Grouped-query attention (arXiv 2305.13245); as many groups as heads is multi-head attention.

    Attributes:
        heads: Query heads.
        groups: Key/value heads.
        head_dim: Width of a head.
        has_qk_norm: RMSNorm of queries and keys.
        has_bias: Queries, keys and values have biases.
        norm_spans_heads: The norms are over all heads at once, not per head.
    """

    heads: int
    groups: int
    head_dim: int
    has_qk_norm: bool = False
    has_bias: bool = False
    norm_spans_heads: bool = False

    @property
    def qk_dim(self) -> int:
        """Width of a query and of a key of one head."""
        return self.head_dim

    @property
    def v_dim(self) -> int:
        """Width of a value of one head."""
        return self.head_dim

    def matmuls(self, hidden: int, tp: int) -> tuple[Matmul, ...]:
        """One product for queries, keys and values, one for the output."""
        return (
            Matmul(self._projected(tp), hidden),
            Matmul(hidden, self._query(tp)),
        )

    def named_shapes(self, hidden: int, tp: int) -> tuple[NamedShape, ...]:
        """The two products, and the query and key norms."""
        first, last = self.matmuls(hidden, tp)
        query_norm, key_norm = self._norm_widths()
        return (
            (r"q_layernorm\.weight$", (query_norm,)),
            (r"k_layernorm\.weight$", (key_norm,)),
            (r"linear_qkv\.weight$", (first.outputs, first.inputs)),
            (r"linear_qkv\.bias$", (first.outputs,)),
            (r"linear_proj\.weight$", (last.outputs, last.inputs)),
        )

    def norm_parameters(self) -> int:
        """Weights of the query and key norms."""
        return sum(self._norm_widths()) if self.has_qk_norm else 0

    def bias_parameters(self, tp: int) -> int:
        """Biases of the queries, keys and values of this rank's heads."""
        return self._projected(tp) if self.has_bias else 0

    def gathered_width(self, hidden: int) -> int:
        """The layer's input."""
        return hidden

    def kept_width(self, tp: int) -> int:
        """Queries, keys, values and the output; queries and keys before their norms.

        The norms keep copies: of the projection queries and keys are views with gaps.
        """
        normed = self._query(tp) + self._key(tp) if self.has_qk_norm else 0
        return 2 * self._query(tp) + 2 * self._key(tp) + normed

    def exchanged_width(self, tp: int) -> int:
        """Keys and values."""
        return 2 * self._key(tp)

    def _norm_widths(self) -> tuple[int, int]:
        """Widths of the query norm and of the key norm."""
        queries, keys = (self.heads, self.groups) if self.norm_spans_heads else (1, 1)
        return queries * self.head_dim, keys * self.head_dim

    def _projected(self, tp: int) -> int:
        """Rows of this rank's projection of queries, keys and values.

        Also with fewer key/value heads than ranks each projects its share of all rows: ranks
        gather the rows of the heads that they share.
        """
        return (self.heads + 2 * self.groups) * self.head_dim // tp

    def _query(self, tp: int) -> int:
        return self.heads // tp * self.head_dim

    def _key(self, tp: int) -> int:
        # With fewer key/value heads than ranks, ranks share one.
        return max(self.groups // tp, 1) * self.head_dim


def attention_of(config: Config) -> GroupedQuery | LatentAttention:
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
