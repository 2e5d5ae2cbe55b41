"""Loads a profile's files: one recording per rank, brought onto one clock."""

from __future__ import annotations

import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from moepp_megatron.config.json_file import read_json
from moepp_megatron.workbench.profiling.formats.kineto import read_kineto
from moepp_megatron.workbench.profiling.formats.sources import SYNTHETIC_MARK
from moepp_megatron.workbench.profiling.trace import ProfileError, RankTrace

_RANK = re.compile(r"rank[-_]?(\d+)")


def load_profile(folder: Path) -> list[RankTrace]:
    """Recordings of all ranks in order, times in microseconds after the first event of all.

    Args:
        folder: A run's folder (its `profile` is read), or one of torch profiler traces.

    Raises:
        ProfileError: If there is none, or one cannot be read.
    """
    place, files = _files(folder)
    if not files:
        raise ProfileError(
            f"profile ({folder}) must be a run's folder with profile/rank0.pt.trace.json.gz, or a "
            "folder of *.pt.trace.json[.gz] files; record one with training.profile_steps=[10,11]"
        )
    traces = [_load(path) for path in files]
    traces.sort(key=lambda trace: trace.rank)
    ranks = [trace.rank for trace in traces]
    if len(set(ranks)) < len(ranks):
        raise ProfileError(
            f"profile ({place}) must hold one trace a rank, and it holds ranks {ranks}; move the "
            "others away"
        )
    return _on_one_clock(traces)


def has_kineto(folder: Path) -> bool:
    """Whether `load_profile` finds traces there."""
    return bool(_files(folder)[1])


def _files(folder: Path) -> tuple[Path, list[Path]]:
    place = folder / "profile" if (folder / "profile").is_dir() else folder
    return place, sorted(
        path
        for pattern in ("*.pt.trace.json", "*.pt.trace.json.gz")
        for path in (place.glob(pattern) if place.is_dir() else [])
        if not path.name.startswith(".")
    )


def _load(path: Path) -> RankTrace:
    trace = read_kineto(path)
    named = _RANK.search(path.name)
    if named is not None:
        # Without a process group the trace says rank 0.
        trace.rank = int(named[1])
    about = path.with_name(path.name.split(".")[0] + ".meta.json")
    if about.is_file():
        trace.about = _about(about)
    if (path.parent / SYNTHETIC_MARK).exists():
        trace.collectives = [replace(one, synthetic=True) for one in trace.collectives]
    return trace


def _about(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise ProfileError(f"{path}: cannot be read ({error}); record the profile again") from None
    if not isinstance(content, dict) or content.get("format") != 1:
        raise ProfileError(f"{path}: format must be 1; record the profile with this version")
    return content


def _on_one_clock(traces: list[RankTrace]) -> list[RankTrace]:
    """Shift every recording so that 0 is the first event of all.

    Ranks of one node share its clock. Clocks of nodes are compared by when their ranks left the
    barriers before the first step.
    """
    reference = _barriers(traces[0])
    offsets = []
    for trace in traces:
        ns = trace.base_ns
        own = _barriers(trace)
        if trace.node != traces[0].node and reference and len(own) == len(reference):
            ahead = statistics.median(a - b for a, b in zip(own, reference, strict=True))
            ns -= round(ahead)
        offsets.append(ns)
    # In whole nanoseconds: Unix time in microseconds has too many digits for a float.
    base, origin = offsets[0], _first(traces[0])
    earliest = min(
        (offset - base) / 1000.0 + _first(trace) - origin
        for offset, trace in zip(offsets, traces, strict=True)
    )
    return [
        trace.shifted((offset - base) / 1000.0 - origin - earliest)
        for offset, trace in zip(offsets, traces, strict=True)
    ]


def _barriers(trace: RankTrace) -> list[int]:
    return list(trace.about.get("clock", {}).get("barrier_unix_ns", []))


def _first(trace: RankTrace) -> float:
    """Start of the first recorded event."""
    starts = [span.start_us for span in trace.steps.values()]
    for found in (trace.collectives, trace.kernels, trace.host_work):
        starts += [one.start_us for one in found[:1]]
    return min(starts, default=0.0)
