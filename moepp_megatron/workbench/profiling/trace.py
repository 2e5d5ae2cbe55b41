"""The recording of one rank, for any backend."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from moepp_megatron.config import ConfigError
from moepp_megatron.workbench.profiling.collective import Collective
from moepp_megatron.workbench.profiling.groups import TracedGroup


class ProfileError(ConfigError):
    """A folder or file that cannot be read as a profile: one line with a remedy."""


@dataclass(frozen=True)
class Span:
    """An interval of work on a lane.

    Attributes:
        name: Its name.
        start_us: Start by the clock of the trace.
        end_us: End by the same clock.
        lane: CUDA stream or host thread.
        kind: forward, recompute, backward for parts of the model; "" otherwise.
    """

    name: str
    start_us: float
    end_us: float
    lane: str = ""
    kind: str = ""

    @property
    def interval(self) -> tuple[float, float]:
        """Start and end."""
        return self.start_us, self.end_us


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
        parts: Parts of the model and of the step, from `moepp/` ranges, and backward passes of
            them.
        steps: Recorded steps by number.
        kernels: GPU kernels that do not communicate.
        host_work: The training thread's operations, without a GPU.
        waits: Spans in which the training thread waits for a collective, without a GPU.
        base_ns: Nanoseconds to add to times to get Unix time.
        about: `rank<k>.meta.json`; empty where there is none.
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
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def node(self) -> str:
        """Host name; "" where unknown."""
        return str(self.about.get("node", ""))

    def shifted(self, us: float) -> RankTrace:
        """The same recording with `us` microseconds added to its times."""

        def move(spans: list[Span]) -> list[Span]:
            return [
                replace(span, start_us=span.start_us + us, end_us=span.end_us + us)
                for span in spans
            ]

        return replace(
            self,
            collectives=[
                replace(one, start_us=one.start_us + us, end_us=one.end_us + us)
                for one in self.collectives
            ],
            parts=move(self.parts),
            steps={number: move([span])[0] for number, span in self.steps.items()},
            kernels=move(self.kernels),
            host_work=move(self.host_work),
            waits=move(self.waits),
            base_ns=self.base_ns - round(us * 1000),
        )
