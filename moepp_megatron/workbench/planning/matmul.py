"""A matrix product of a layer, and how its weight is found among a rank's parameters."""

from __future__ import annotations

from dataclasses import dataclass

# A pattern that a parameter's name ends in, and the parameter's shape on a rank.
NamedShape = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Matmul:
    """A weight [outputs, inputs] of one rank and the tokens that it sees.

    Attributes:
        outputs: Rows of the weight on this rank.
        inputs: Columns of the weight on this rank.
        is_sequence_parallel: Whether it sees the rank's own share of the sequence instead of all of
            it, because its weight is whole on every tensor-parallel rank.
        is_up_projection: Whether it expands a compressed vector (`mla_up_proj` of megatron-core's
            recomputation).
    """

    outputs: int
    inputs: int
    is_sequence_parallel: bool = False
    is_up_projection: bool = False
