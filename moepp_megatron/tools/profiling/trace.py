"""The recording of one rank, for any backend: its collectives, kernels, parts and routing.

Sizes of collectives follow nccl-tests (doc/PERFORMANCE.md): `size` is the bytes of the larger of
the two buffers of a rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, Field

from moepp_megatron.config import ConfigError

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


class ProfileError(ConfigError):
    """A folder or file that cannot be read as a profile: one line with a remedy."""


class Operation(StrEnum):
    """Kind of collective."""

    ALL_TO_ALL = "all_to_all"
    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    REDUCE = "reduce"
    BROADCAST = "broadcast"
    GATHER = "gather"
    SCATTER = "scatter"
    SEND = "send"
    RECEIVE = "receive"
    BARRIER = "barrier"
    OTHER = "other"


POINT_TO_POINT = frozenset({Operation.SEND, Operation.RECEIVE})


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One call on one rank; fields are empty, 0 or None where unknown."""

    operation: Operation
    rank: int  # global rank that recorded it
    group: str = ""  # name of the process group in its backend
    group_ranks: tuple[int, ...] = ()  # global ranks, in order
    group_size: int = 0
    size: int | None = None  # bytes, by nccl-tests' convention
    sent: tuple[int, ...] | None = None  # bytes to each rank of the group, in its order
    received: tuple[int, ...] | None = None  # bytes from each rank of the group
    sequence: int | None = None  # number of the call in its group, the same on all ranks
    # Of the transfer (on a host backend, the call), by the clock of this rank's file.
    start_us: float = 0.0
    end_us: float = 0.0
    # Ranks of the group that a send or receive goes from and to, within which `sequence` then
    # counts; None for what all ranks do.
    pair: tuple[int, int] | None = None
    row_bytes: int | None = None  # of a row, the unit in which an all-to-all is split
    scopes: tuple[str, ...] = ()  # profiler ranges it lies in, outermost first

    @property
    def duration_us(self) -> float:
        """Microseconds from start to end, waiting for late ranks included."""
        return self.end_us - self.start_us


@dataclass(frozen=True)
class TracedGroup:
    """A process group as one rank sees it: name in the backend, global ranks, `group_desc`."""

    name: str
    ranks: tuple[int, ...]
    description: str = ""

    @property
    def meaning(self) -> str:
        """expert, tensor, data, pipeline, ...; else the description itself."""
        known = (name for part, name in _MEANINGS if part in self.description)
        return next(known, self.description or "unknown")


class Span(NamedTuple):
    """Start and end of something, in microseconds by the clock of the trace."""

    start_us: float
    end_us: float


_Count = Annotated[int, Field(ge=0, le=10**18)]


class Pass(BaseModel):
    """Routing in one forward pass of a layer (features/profile/part.py)."""

    layer: _Count  # global number
    recomputed: bool  # repeated by the backward pass
    dispatcher: str  # its class
    tokens: _Count  # of this rank
    topk: _Count
    row_bytes: _Count  # of a hidden vector
    ranks: int = Field(ge=1, le=10**18)  # of the expert-parallel group
    own: _Count  # this rank's number in it
    to_ranks: list[_Count]  # FFN selections by the rank that has the expert
    copies_to_ranks: list[_Count]  # the same with each token counted once a rank


class _Passes(BaseModel):
    """The passes of a recorded step."""

    step: int
    passes: list[Pass] = []


class _Clock(BaseModel):
    """Unix time in nanoseconds at which this rank left barriers before the first step."""

    barrier_unix_ns: list[int] = []


class About(BaseModel):
    """Metadata file of a trace: `rank<k>.meta.json` (features/profile)."""

    format: Literal[1] = 1
    name: str = ""
    world_size: int = Field(default=0, ge=0, le=10**9)
    node: str = ""
    nodes: list[str] = []
    device: str = ""
    layout: dict[str, _Count] = {}
    dispatcher: str | None = None
    clock: _Clock = _Clock()
    steps: list[_Passes] = []


@dataclass
class RankTrace:
    """One rank's recording."""

    rank: int  # global
    backend: str = ""  # nccl or gloo; "" where unknown
    on_gpu: bool = False  # has GPU kernels
    groups: dict[str, TracedGroup] = field(default_factory=dict)  # of this rank, by name
    collectives: list[Collective] = field(default_factory=list)  # in order of their start
    steps: dict[int, Span] = field(default_factory=dict)  # by number
    kernels: list[Span] = field(default_factory=list)  # of the GPU that do not communicate
    waits: list[Span] = field(default_factory=list)  # for a collective, without a GPU
    base_ns: int = 0  # to add to times to get Unix time
    about: About = field(default_factory=About)  # what the recorder wrote next to the trace

    def passes(self, step: int) -> list[Pass]:
        """Return the routing of a step by pass."""
        return [run for entry in self.about.steps if entry.step == step for run in entry.passes]

    def shifted(self, us: float) -> RankTrace:
        """The same recording with `us` microseconds added to its times."""

        def moved(spans: Iterable[Span]) -> list[Span]:
            return [Span(start + us, end + us) for start, end in spans]

        return replace(
            self,
            collectives=[
                replace(call, start_us=call.start_us + us, end_us=call.end_us + us)
                for call in self.collectives
            ],
            steps=dict(zip(self.steps, moved(self.steps.values()), strict=True)),
            kernels=moved(self.kernels),
            waits=moved(self.waits),
            base_ns=self.base_ns - round(us * 1000),
        )
