"""Multi-head latent attention in the cost model."""

from __future__ import annotations

from dataclasses import dataclass

from moepp_megatron.workbench.planning.matmul import Matmul, NamedShape


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (arXiv 2405.04434, section 2.1) as Megatron-LM lays it out.

    With Transformer Engine's modules, compressions are whole on every tensor-parallel rank and see
    its own tokens; their results are gathered, expansions are split over the ranks.

    Attributes:
        heads: Heads.
        query_rank: Width of the compressed query; None where queries come from the input.
        key_rank: Width of the compressed keys and values.
        plain_dim: Width of a head's query and key without position.
        rotary_dim: Width of the part with position, shared by all heads' keys.
        v_dim: Width of a value.
        has_norms: The compressed vectors are normalised.
        splits_compressions: Compressions are split over the ranks and see all tokens, as
            megatron-core's local modules do it (a rank built without Transformer Engine).
    """

    heads: int
    query_rank: int | None
    key_rank: int
    plain_dim: int
    rotary_dim: int
    v_dim: int
    has_norms: bool = True
    splits_compressions: bool = False

    @property
    def qk_dim(self) -> int:
        """Width of a query and of a key of one head."""
        return self.plain_dim + self.rotary_dim

    def matmuls(self, hidden: int, tp: int) -> tuple[Matmul, ...]:
        """Compressions and expansions of queries and of keys and values, the output."""
        return tuple(self._by_name(hidden, tp).values())

    def named_shapes(self, hidden: int, tp: int) -> tuple[NamedShape, ...]:
        """The projections, and norms, which Transformer Engine holds inside the expansions."""
        products = tuple(
            (rf"{name}\.weight$", (product.outputs, product.inputs))
            for name, product in self._by_name(hidden, tp).items()
        )
        return (
            (r"(q_layernorm\.|linear_q_up_proj\.layer_norm_)weight$", (self.query_rank or 0,)),
            (r"(kv_layernorm\.|linear_kv_up_proj\.layer_norm_)weight$", (self.key_rank,)),
            *products,
        )

    def _by_name(self, hidden: int, tp: int) -> dict[str, Matmul]:
        """The products by megatron-core's names of their modules, the output projection last."""
        heads = self.heads // tp
        queries = heads * self.qk_dim
        keys = heads * (self.plain_dim + self.v_dim)
        products = {}
        if self.query_rank is None:
            products["linear_q_proj"] = Matmul(queries, hidden, is_up_projection=True)
        else:
            products["linear_q_down_proj"] = self._compression(self.query_rank, hidden, tp)
        products["linear_kv_down_proj"] = self._compression(
            self.key_rank + self.rotary_dim, hidden, tp
        )
        if self.query_rank is not None:
            products["linear_q_up_proj"] = Matmul(queries, self.query_rank, is_up_projection=True)
        products["linear_kv_up_proj"] = Matmul(keys, self.key_rank, is_up_projection=True)
        products["linear_proj"] = Matmul(hidden, heads * self.v_dim)
        return products

    def _compression(self, width: int, hidden: int, tp: int) -> Matmul:
        if self.splits_compressions:
            return Matmul(width // tp, hidden)
        return Matmul(width, hidden, is_sequence_parallel=True)

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
        own = self.heads // tp * (2 * self.qk_dim + 2 * self.v_dim)
        return own + self.gathered_width(0)

    def exchanged_width(self, tp: int) -> int:
        """Keys and values."""
        return self.heads // tp * (self.qk_dim + self.v_dim)
