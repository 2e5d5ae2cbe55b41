"""Loads a profile's files: one recording per rank, brought onto one clock."""

import re
import statistics
from pathlib import Path

from moepp_megatron.tools.profiling.formats.kineto import read_kineto
from moepp_megatron.tools.profiling.formats.records import read_document, read_model
from moepp_megatron.tools.profiling.trace import About, ProfileError, RankTrace

_RANK = re.compile(r"rank[-_]?(\d{1,9})")


def load_profile(folder: Path) -> list[RankTrace]:
    """Recordings of all ranks in order, times in microseconds after the first event of all.

    Args:
        folder: A run's folder (its `profile` is read), or one of torch profiler traces.

    Raises:
        ProfileError: If there is none, or one cannot be read.
    """
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
            ahead = statistics.median(a - b for a, b in zip(own, reference, strict=True))
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
