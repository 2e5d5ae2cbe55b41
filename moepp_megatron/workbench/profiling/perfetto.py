"""Writes one trace of all ranks, for Perfetto (ui.perfetto.dev) and chrome://tracing.

It has one process per rank: its steps and parts, its collectives by stream, its kernels or
operations. A collective carries its group, size, bandwidth and waiting as arguments.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from typing import Any

from moepp_megatron.workbench.profiling.analysis import Profile
from moepp_megatron.workbench.profiling.measures.classes import class_name
from moepp_megatron.workbench.profiling.trace import RankTrace, Span

# Order of the lanes within a rank.
_PARTS, _WAITS, _WORK, _COMMUNICATION = 1, 2, 3, 1000


def merged_trace(profile: Profile) -> bytes:
    """The gzipped JSON (chrome's trace event format; times in microseconds)."""
    events = [event for trace in profile.traces for event in _rank(profile, trace)]
    content = {"traceEvents": events, "displayTimeUnit": "ms"}
    # Without a time in the header the same profile gives the same bytes.
    return gzip.compress(json.dumps(content, separators=(",", ":")).encode(), mtime=0)


def _rank(profile: Profile, trace: RankTrace) -> Iterator[dict[str, Any]]:
    node = f" ({trace.node})" if trace.node else ""
    yield _named("process_name", trace.rank, 0, f"rank {trace.rank}{node}")
    yield from _lane(trace.rank, _PARTS, "parts", [*trace.steps.values(), *trace.parts])
    yield from _lane(trace.rank, _WAITS, "waiting", trace.waits)
    streams: dict[str, list[Span]] = {}
    for one in trace.kernels or trace.host_work:
        streams.setdefault(one.lane, []).append(one)
    for place, (stream, spans) in enumerate(sorted(streams.items())):
        name = f"stream {stream}" if trace.on_gpu else "operations"
        yield from _lane(trace.rank, _WORK + place, name, spans)
    yield from _collectives(profile, trace)


def _lane(rank: int, tid: int, name: str, spans: list[Span]) -> Iterator[dict[str, Any]]:
    if not spans:
        return
    yield _named("thread_name", rank, tid, name)
    for one in spans:
        label = f"{one.name} ({one.kind})" if one.kind not in ("", "forward") else one.name
        yield _complete(label, rank, tid, one.interval)


def _collectives(profile: Profile, trace: RankTrace) -> Iterator[dict[str, Any]]:
    lanes: dict[str, int] = {}
    for place, call in enumerate(trace.collectives):
        if call.stream not in lanes:
            lanes[call.stream] = _COMMUNICATION + len(lanes)
            title = f"communication {call.stream}"
            yield _named("thread_name", trace.rank, lanes[call.stream], title)
        name = class_name(trace, call)
        event = _complete(
            f"{name.purpose}: {call.operation}",
            trace.rank,
            lanes[call.stream],
            (call.start_us, call.end_us),
        )
        late = profile.late.get((trace.rank, place))
        event["args"] = {
            "group": f"{name.group} {list(call.group_ranks)}",
            "pass": name.phase,
            "bytes": call.size,
            "bus bandwidth GB/s": call.bus_bandwidth,
            "waiting us": late.wait_us if late else None,
            "last rank": late.last_rank if late else None,
        }
        yield event


def _complete(name: str, rank: int, tid: int, interval: tuple[float, float]) -> dict[str, Any]:
    start, end = interval
    return {"ph": "X", "name": name, "pid": rank, "tid": tid, "ts": start, "dur": end - start}


def _named(kind: str, rank: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": rank, "tid": tid, "args": {"name": name}}
