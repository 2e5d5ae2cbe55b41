"""All results of `moepp profile` for a recording, as numbers."""

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from moepp_megatron.tools.profiling.formats.kineto import read_kineto
from moepp_megatron.tools.profiling.formats.records import read_document, read_model
from moepp_megatron.tools.profiling.measures.classes import CallClass, call_classes
from moepp_megatron.tools.profiling.measures.expected_bytes import (
    ExpectedLayerBytes,
    layer_bytes,
)
from moepp_megatron.tools.profiling.measures.expert_load import (
    ExpertLoad,
    SlowRank,
    expert_load,
    slow_rank,
)
from moepp_megatron.tools.profiling.measures.exposure import MeasuredStepTime, step_time
from moepp_megatron.tools.profiling.measures.lateness import CallKey, Lateness, lateness
from moepp_megatron.tools.profiling.trace import About, ProfileError, RankTrace

_RANK = re.compile(r"rank[-_]?(\d{1,9})")


@dataclass
class Profile:
    """The analysis of a recording."""

    name: str  # of the run or folder
    traces: list[RankTrace]  # of all recorded ranks, on one clock
    steps: list[int]  # the analysed ones
    times: dict[int, dict[int, MeasuredStepTime]]  # by step and rank
    classes: list[CallClass]  # the most exposed first; sums over ranks and steps
    layers: dict[int, list[ExpectedLayerBytes]]  # by step
    load: ExpertLoad | None  # None where unknown
    slow: SlowRank | None  # computes longer than its rows explain
    caused_us: dict[int, float]  # by rank, how long others waited for it in all these steps
    late: dict[CallKey, Lateness]

    @property
    def about(self) -> About:
        """Metadata of the first trace."""
        return self.traces[0].about

    @property
    def ranks(self) -> list[int]:
        """The recorded ranks."""
        return [trace.rank for trace in self.traces]

    @property
    def world_size(self) -> int:
        """Ranks of the run; at least those recorded."""
        return self.about.world_size or len(self.traces)

    @property
    def rank_steps(self) -> list[MeasuredStepTime]:
        """The times of all recorded steps of all ranks."""
        return [time for ranks in self.times.values() for time in ranks.values()]

    @property
    def step_times_us(self) -> list[float]:
        """Length of each step on its slowest rank."""
        return [max(time.step_us for time in ranks.values()) for ranks in self.times.values()]

    @property
    def step_us(self) -> float:
        """Mean length of a step on its slowest rank."""
        return fmean(self.step_times_us)

    @property
    def exposed_share(self) -> float:
        """Exposed communication over step time, mean over ranks and steps."""
        return fmean(time.exposed_share for time in self.rank_steps)

    @property
    def critical_rank(self) -> int | None:
        """The rank that the others waited for most; None where no call could be matched."""
        if not any(self.caused_us.values()):
            return None
        return max(self.caused_us, key=lambda rank: self.caused_us[rank])

    @property
    def all_layers(self) -> list[ExpectedLayerBytes]:
        """All-to-all bytes of all steps."""
        return [layer for step in self.steps for layer in self.layers[step]]

    @property
    def equals_formula(self) -> bool | None:
        """True if every measured all-to-all equals its formula; None if none is comparable."""
        known = [layer.is_equal for layer in self.all_layers if layer.is_equal is not None]
        return all(known) if known else None


def analyse(folder: Path, step: int | None = None) -> Profile:
    """Read and analyse a recording; ProfileError if it cannot be read, or does not hold `step`."""
    traces = _load_profile(folder)
    steps = _steps(traces, step)
    late = lateness({trace.rank: trace.collectives for trace in traces})
    load = expert_load(traces, steps)
    times = {
        number: {
            trace.rank: step_time(trace, trace.steps[number])
            for trace in traces
            if number in trace.steps
        }
        for number in steps
    }
    return Profile(
        name=traces[0].about.name or folder.resolve().name,
        traces=traces,
        steps=steps,
        times=times,
        classes=call_classes(traces, steps, late),
        layers={number: layer_bytes(traces, number) for number in steps},
        load=load,
        slow=slow_rank(traces, times, load),
        caused_us=_caused(traces, steps, late),
        late=late,
    )


def _steps(traces: list[RankTrace], step: int | None) -> list[int]:
    recorded = sorted({number for trace in traces for number in trace.steps})
    if not recorded:
        raise ProfileError(
            "profile must hold a step, and its traces have none of the ranges moepp/step/N; record "
            "it with training.profile_steps, or put such a range around a step"
        )
    if step is not None and step not in recorded:
        raise ProfileError(f"--step ({step}) must be a recorded step; use one of {recorded}")
    return recorded if step is None else [step]


def _caused(
    traces: list[RankTrace], steps: list[int], late: dict[CallKey, Lateness]
) -> dict[int, float]:
    caused: dict[int, float] = defaultdict(float, {trace.rank: 0.0 for trace in traces})
    for trace in traces:
        spans = [trace.steps[step] for step in steps if step in trace.steps]
        for place, call in enumerate(trace.collectives):
            lateness = late.get((trace.rank, place))
            within = any(span.start_us <= call.start_us < span.end_us for span in spans)
            if lateness is not None and within:
                caused[lateness.last_rank] += lateness.wait_us
    return dict(caused)


def _load_profile(folder: Path) -> list[RankTrace]:
    """All ranks' recordings in order, in microseconds after the first event, or a ProfileError."""
    files = _files(folder)
    if not files:
        raise ProfileError(
            f"profile ({folder}) must be a run's folder with profile/rank0.pt.trace.json.gz, or a "
            "folder of *.pt.trace.json[.gz] files; record one with training.profile_steps=[10,11]"
        )
    traces = sorted((_load(path) for path in files), key=lambda trace: trace.rank)
    ranks = [trace.rank for trace in traces]
    if len(set(ranks)) < len(ranks):
        raise ProfileError(
            f"profile ({files[0].parent}) must hold one trace a rank, and it holds ranks {ranks}; "
            "move the others away"
        )
    return _on_one_clock(traces)


def _files(folder: Path) -> list[Path]:
    place = folder / "profile" if (folder / "profile").is_dir() else folder
    return sorted(
        path
        for pattern in ("*.pt.trace.json", "*.pt.trace.json.gz")
        for path in (place.glob(pattern) if place.is_dir() else [])
        if not path.name.startswith(".")
    )


def _load(path: Path) -> RankTrace:
    trace = read_kineto(path)
    if named := _RANK.search(path.name):
        # Without a process group the trace says rank 0.
        trace.rank = int(named[1])
    about = path.with_name(path.name.split(".")[0] + ".meta.json")
    if about.is_file():
        remedy = "record the profile with this version"
        trace.about = read_model(about, About, read_document(about), remedy)
    return trace


def _on_one_clock(traces: list[RankTrace]) -> list[RankTrace]:
    """Shift every recording so that 0 is the first event of all."""
    # Ranks of one node share its clock. Clocks of nodes are compared by when their ranks left the
    # barriers before the first step.
    reference = traces[0].about.clock.barrier_unix_ns
    # In whole nanoseconds: Unix time in microseconds has too many digits for a float.
    offsets = []
    for trace in traces:
        own, ahead = trace.about.clock.barrier_unix_ns, 0.0
        apart = trace.about.node != traces[0].about.node
        if apart and reference and len(own) == len(reference):
            ahead = median(a - b for a, b in zip(own, reference, strict=True))
        offsets.append(trace.base_ns - round(ahead) - traces[0].base_ns)
    firsts = [
        offset / 1000.0 + _first(trace) for offset, trace in zip(offsets, traces, strict=True)
    ]
    return [
        trace.shifted(offset / 1000.0 - min(firsts))
        for offset, trace in zip(offsets, traces, strict=True)
    ]


def _first(trace: RankTrace) -> float:
    """Start of the first recorded event."""
    starts = [span.start_us for span in (*trace.steps.values(), *trace.kernels[:1])]
    return min(starts + [call.start_us for call in trace.collectives[:1]], default=0.0)
