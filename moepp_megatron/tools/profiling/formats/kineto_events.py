"""Reads events of a Kineto trace, with the ranges of the program around each of them.

A host thread's events are nested. One pass over each thread, in order of time, finds for every
event what is open around it: ranges `moepp/...`, and the node of autograd's graph that runs. An
operation and its derivative are linked by a flow (`fwdbwd`), which gives the derivative the part
of the model that the operation belongs to. A range that is entered inside of a node of the graph
is a forward pass that is recomputed.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from moepp_megatron.tools.profiling.formats import records
from moepp_megatron.tools.profiling.trace import ProfileError, Span

# Where an operation began: thread and time identify it.
Key = tuple[str, float]

_PREFIX = "moepp/"
_COMM = re.compile(r"comm/([^/]+)/(?:(\d{1,9})>(\d{1,9})\.)?(\d{1,18})/(\w+)")
_STEP = re.compile(r"step/(\d{1,18})")
_MODEL_PART = re.compile(r"(layer\d{1,9}|model)/\w+")
_NODE = "autograd::engine::evaluate_function"


@dataclass(frozen=True, slots=True)
class TraceEvent:
    """An event with a duration; times in microseconds by the trace's clock."""

    name: str
    category: str
    thread: str
    start: float
    duration: float
    args: dict[str, Any]

    @property
    def key(self) -> Key:
        """Thread and time."""
        return self.thread, self.start

    @property
    def end(self) -> float:
        """When it ended."""
        return self.start + self.duration

    @property
    def span(self) -> Span:
        """The time that it takes."""
        return Span(self.start, self.end)


def read_events(events: list[Any], place: str) -> tuple[list[TraceEvent], dict[Key, Key]]:
    """Events with a duration, and each derivative's operation; ProfileError for a bad field."""
    result: list[TraceEvent] = []
    ends: dict[str, dict[Any, Key]] = {"s": {}, "f": {}}
    for number, raw in enumerate(events):
        where = f"{place}, traceEvents[{number}]"
        if not isinstance(raw, dict):
            raise ProfileError(f"{where}: an event is expected, not {type(raw).__name__}")
        phase, category = raw.get("ph"), raw.get("cat")
        if phase == "X" and "dur" in raw:
            result.append(
                TraceEvent(
                    name=records.field(raw, "name", str, where),
                    category=category if isinstance(category, str) else "",
                    thread=_thread(raw, where),
                    start=records.field(raw, "ts", float, where),
                    duration=records.field(raw, "dur", float, where, least=0),
                    args=records.field(raw, "args", dict, where, {}),
                )
            )
        elif category == "fwdbwd" and (phase == "s" or phase == "f"):
            start = records.field(raw, "ts", float, where)
            ends[phase][str(raw.get("id"))] = (_thread(raw, where), start)
    links = {at: ends["s"][number] for number, at in ends["f"].items() if number in ends["s"]}
    return result, links


def _thread(raw: dict[str, Any], where: str) -> str:
    kind = str if isinstance(raw.get("tid"), str) else int
    return str(records.field(raw, "tid", kind, where))


class _Call(NamedTuple):
    """A collective as the recorder named it: group, sender and receiver in it, number."""

    group: str
    pair: tuple[int, int] | None
    number: int


class Around(NamedTuple):
    """Scopes around an event, outermost first, and its collective if the recorder named it.

    Scopes are such as forward, layer3/dispatch, layer3/dispatch:backward and optimizer.
    """

    scopes: tuple[str, ...] = ()
    call: _Call | None = None


@dataclass
class Swept:
    """The results of a pass over all host threads."""

    around: dict[Key, Around] = field(default_factory=dict)  # events of interest
    waits: list[Span] = field(default_factory=list)  # of the thread for a collective
    steps: dict[int, Span] = field(default_factory=dict)


def sweep(events: list[TraceEvent], links: dict[Key, Key], wanted: Iterable[TraceEvent]) -> Swept:
    """Find what is around the wanted events, and the ranges; `links` are of `read_events`."""
    threads: dict[str, list[TraceEvent]] = defaultdict(list)
    for event in events:
        if event.category in ("cpu_op", "user_annotation"):
            threads[event.thread].append(event)
    for of_thread in threads.values():
        of_thread.sort(key=lambda event: (event.start, -event.duration))
    keys = {event.key for event in wanted}
    # Parts of operations: their derivatives may run on another thread, and a recomputed forward
    # pass inside of a derivative has derivatives of its own. So everything is passed twice.
    parts: dict[Key, str] = {}
    swept = Swept()
    for _ in range(2):
        swept = Swept()
        for of_thread in threads.values():
            _Pass(swept, links, parts, keys).run(of_thread)
    return swept


class _Open(NamedTuple):
    end: float
    scope: str | None
    call: _Call | None
    is_node: bool


class _Pass:
    """One pass over one thread's events in order of time; completes `swept` and `parts`."""

    def __init__(
        self, swept: Swept, links: dict[Key, Key], parts: dict[Key, str], keys: set[Key]
    ) -> None:
        self._swept, self._links, self._parts, self._keys = swept, links, parts, keys
        self._operations = set(links.values())
        self._open: list[_Open] = []

    def run(self, events: list[TraceEvent]) -> None:
        for event in events:
            while self._open and self._open[-1].end <= event.start:
                self._open.pop()
            self._enter(event)

    def _enter(self, event: TraceEvent) -> None:
        at, scope, call, is_node = event.key, None, None, False
        if event.name.startswith(_PREFIX):
            scope, call = self._range(event, event.name.removeprefix(_PREFIX))
        elif at in self._links:
            part = self._parts.get(self._links[at])
            if part is not None:
                scope = f"{part.split(':')[0]}:backward"
        elif event.name.startswith(_NODE):
            is_node = True
        if at in self._operations and (part := self._innermost_part()) is not None:
            self._parts[at] = part
        if at in self._keys:
            self._swept.around[at] = Around(
                tuple(span.scope for span in self._open if span.scope is not None),
                next((span.call for span in reversed(self._open) if span.call is not None), None),
            )
        if scope is not None or call is not None or is_node:
            self._open.append(_Open(event.end, scope, call, is_node))

    def _range(self, event: TraceEvent, name: str) -> tuple[str | None, _Call | None]:
        """The scope or collective that a range of the recorder means."""
        if found := _COMM.fullmatch(name):
            pair = (int(found[2]), int(found[3])) if found[2] else None
            return None, _Call(found[1], pair, int(found[4]))
        if name == "wait":
            self._swept.waits.append(event.span)
            return None, None
        if found := _STEP.fullmatch(name):
            self._swept.steps[int(found[1])] = event.span
            return None, None
        recomputed = _MODEL_PART.fullmatch(name) and any(span.is_node for span in self._open)
        return (f"{name}:recompute" if recomputed else name), None

    def _innermost_part(self) -> str | None:
        scopes = (span.scope for span in reversed(self._open))
        return next((scope for scope in scopes if scope is not None and "/" in scope), None)
