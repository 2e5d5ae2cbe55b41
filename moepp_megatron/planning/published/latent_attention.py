"""Multi-head latent attention, for DeepSeek-V3's published result."""

from __future__ import annotations

from dataclasses import dataclass

from moepp_megatron.planning.attention import Matmul


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (arXiv 2405.04434, section 2.1) as Megatron-LM lays it out.

    Compressions are whole on every tensor-parallel rank and see its own tokens; what they give is
    gathered, expansions are split over the ranks.

    Attributes:
        heads: Heads.
        query_rank: Width of the compressed query.
        key_rank: Width of the compressed keys and values.
        plain_dim: Width of a head's query and key without position.
        rotary_dim: Width of the part with position, shared by all heads' keys.
        v_dim: Width of a value.
    """

    heads: int
    query_rank: int
    key_rank: int
    plain_dim: int
    rotary_dim: int
    v_dim: int

    @property
    def qk_dim(self) -> int:
        """Width of a query and of a key of one head."""
        return self.plain_dim + self.rotary_dim

    def matmuls(self, hidden: int, tp: int) -> tuple[Matmul, ...]:
        """Two compressions, two expansions, the output."""
        heads = self.heads // tp
        return (
            Matmul(self.query_rank, hidden, is_sequence_parallel=True),
            Matmul(self.key_rank + self.rotary_dim, hidden, is_sequence_parallel=True),
            Matmul(heads * self.qk_dim, self.query_rank, is_up_projection=True),
            Matmul(heads * (self.plain_dim + self.v_dim), self.key_rank, is_up_projection=True),
            Matmul(hidden, heads * self.v_dim),
        )

    def norm_parameters(self) -> int:
        """Norms of the compressed vectors."""
        return self.query_rank + self.key_rank

    def gathered_width(self, hidden: int) -> int:
        """The compressed vectors."""
        return self.query_rank + self.key_rank + self.rotary_dim

    def kept_width(self, tp: int) -> int:
        """Queries, keys, values, output of the core, and the compressed vectors."""
        own = self.heads // tp * (2 * self.qk_dim + 2 * self.v_dim)
        return own + self.gathered_width(0)

    def exchanged_width(self, tp: int) -> int:
        """Keys and values."""
        return self.heads // tp * (self.qk_dim + self.v_dim)
