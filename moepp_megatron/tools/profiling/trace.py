"""The recording of one rank, for any backend."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from moepp_megatron.config import ConfigError
from moepp_megatron.tools.profiling.collective import Collective

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


@dataclass(frozen=True)
class Span:
    """An interval of work.

    Attributes:
        name: Its name.
        start_us: Start by the clock of the trace.
        end_us: End by the same clock.
        kind: forward, recompute, backward for parts of the model; "" otherwise.
    """

    name: str
    start_us: float
    end_us: float
    kind: str = ""

    @property
    def interval(self) -> tuple[float, float]:
        """Start and end."""
        return self.start_us, self.end_us


_Count = Annotated[int, Field(ge=0, le=10**18)]


class Pass(BaseModel):
    """Routing in one forward pass of a layer (features/profile/part.py).

    Attributes:
        layer: Global layer number.
        recomputed: Whether the backward pass repeated it.
        dispatcher: Class of the dispatcher.
        tokens: Tokens of this rank.
        topk: Selections of a token.
        selections: Those of FFN experts.
        row_bytes: Bytes of a hidden vector.
        ranks: Ranks of the expert-parallel group.
        own: This rank's number in it.
        to_ranks: FFN selections by the rank that has the expert.
        copies_to_ranks: The same with each token counted once a rank.
    """

    layer: _Count
    recomputed: bool
    dispatcher: str
    tokens: _Count
    topk: _Count
    selections: _Count
    row_bytes: _Count
    ranks: int = Field(ge=1, le=10**18)
    own: _Count
    to_ranks: list[_Count]
    copies_to_ranks: list[_Count]


class Passes(BaseModel):
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
    steps: list[Passes] = []


@dataclass
class RankTrace:
    """One rank's recording.

    Attributes:
        rank: Global rank.
        backend: nccl or gloo; "" where unknown.
        on_gpu: Whether it has GPU kernels: then they are the work, else the training thread's
            operations are.
        groups: Process groups of this rank by name.
        collectives: Collectives in order of their start.
        parts: Parts of the model and of the step, and backward passes of them.
        steps: Recorded steps by number.
        kernels: GPU kernels that do not communicate.
        host_work: The training thread's operations, without a GPU.
        waits: Spans in which the training thread waits for a collective, without a GPU.
        base_ns: Nanoseconds to add to times to get Unix time.
        about: What the recorder wrote next to the trace.
    """

    rank: int
    backend: str = ""
    on_gpu: bool = False
    groups: dict[str, TracedGroup] = field(default_factory=dict)
    collectives: list[Collective] = field(default_factory=list)
    parts: list[Span] = field(default_factory=list)
    steps: dict[int, Span] = field(default_factory=dict)
    kernels: list[Span] = field(default_factory=list)
    host_work: list[Span] = field(default_factory=list)
    waits: list[Span] = field(default_factory=list)
    base_ns: int = 0
    about: About = field(default_factory=About)

    def passes(self, step: int) -> list[Pass]:
        """Return the routing of a step by pass."""
        return [run for entry in self.about.steps if entry.step == step for run in entry.passes]

    def shifted(self, us: float) -> RankTrace:
        """The same recording with `us` microseconds added to its times."""
        return replace(
            self,
            collectives=_shifted(self.collectives, us),
            parts=_shifted(self.parts, us),
            steps={n: _shifted([span], us)[0] for n, span in self.steps.items()},
            kernels=_shifted(self.kernels, us),
            host_work=_shifted(self.host_work, us),
            waits=_shifted(self.waits, us),
            base_ns=self.base_ns - round(us * 1000),
        )


def _shifted[Timed: (Span, Collective)](timed: list[Timed], us: float) -> list[Timed]:
    """The same with `us` microseconds added to starts and ends."""
    return [replace(item, start_us=item.start_us + us, end_us=item.end_us + us) for item in timed]
