"""The purpose of a process group, from megatron-core's description of it."""

from __future__ import annotations

from dataclasses import dataclass

# megatron/core/parallel_state.py 0.19.2, `group_desc`; from the longest name to the shortest.
_MEANINGS = (
    ("EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP", "expert model"),
    ("EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP", "expert"),
    ("INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP", "data"),
    ("INTRA_PARTIAL_DATA_PARALLEL_GROUP", "data"),
    ("TENSOR_AND_DATA_PARALLEL_GROUP", "tensor and data"),
    ("TENSOR_AND_CONTEXT_PARALLEL_GROUP", "tensor and context"),
    ("PIPELINE_MODEL_PARALLEL_GROUP", "pipeline"),
    ("TENSOR_MODEL_PARALLEL_GROUP", "tensor"),
    ("POSITION_EMBEDDING_GROUP", "embedding"),
    ("EXPERT_MODEL_PARALLEL_GROUP", "expert"),
    ("EXPERT_TENSOR_PARALLEL_GROUP", "expert tensor"),
    ("EXPERT_DATA_PARALLEL_GROUP", "expert data"),
    ("CONTEXT_PARALLEL_GROUP", "context"),
    ("HIERARCHICAL_CONTEXT", "context"),
    ("DATA_PARALLEL_GROUP", "data"),
    ("HYBRID_DP_CP_GROUP", "data"),
    ("MODEL_PARALLEL_GROUP", "model"),
    ("EMBEDDING_GROUP", "embedding"),
    ("default_pg", "all ranks"),
)
DATA_MEANINGS = frozenset({"data", "expert data", "tensor and data"})


@dataclass(frozen=True)
class TracedGroup:
    """A process group as one rank sees it.

    Attributes:
        name: Name of the backend, such as "23".
        ranks: Global ranks, in order.
        description: Description by its creator; "" where unknown.
    """

    name: str
    ranks: tuple[int, ...]
    description: str = ""

    @property
    def meaning(self) -> str:
        """expert, tensor, data, pipeline, ...; else the description itself."""
        return meaning(self.description) or self.description or "unknown"


def meaning(description: str) -> str | None:
    """The meaning of a description; None for one that megatron-core does not use."""
    for part, name in _MEANINGS:
        if part in description:
            return name
    return None
