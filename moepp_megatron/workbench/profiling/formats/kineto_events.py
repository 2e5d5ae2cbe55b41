"""Reads events of a Kineto chrome trace, with the ranges of the program around each of them.

A host thread's events are nested. One pass over each thread, in order of time, finds for every
event what is open around it: ranges `moepp/...`, and the node of autograd's graph that runs. An
operation and its derivative are linked by a flow (`fwdbwd`), which gives the derivative the part
of the model that the operation belongs to. A range that is entered inside of a node of the graph
is a forward pass that is recomputed.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from moepp_megatron.workbench.profiling.trace import Span

Event = dict[str, Any]
# Where an operation began: thread and time identify it.
Key = tuple[Any, float]

_PREFIX = "moepp/"
_COMM = re.compile(r"comm/([^/]+)/(?:(\d+)>(\d+)\.)?(\d+)/(\w+)")
_MODEL_PART = re.compile(r"(layer\d+|model)/\w+")
_NODE = "autograd::engine::evaluate_function"


@dataclass(frozen=True)
class Call:
    """A collective as the recorder named it.

    Attributes:
        group: Process group.
        pair: Sender and receiver, as ranks of the group; None for an operation of all ranks.
        number: Number of the call in its group, or pair.
    """

    group: str
    pair: tuple[int, int] | None
    number: int


@dataclass
class Around:
    """The ranges and the call that are open around an event.

    Attributes:
        scopes: Parts of the program, outermost first: forward, layer3/dispatch,
            layer3/dispatch:backward, optimizer, ...
        call: The collective that it belongs to, if the recorder named it.
    """

    scopes: tuple[str, ...] = ()
    call: Call | None = None


@dataclass
class Swept:
    """The results of a pass over all host threads.

    Attributes:
        around: Surroundings of each event of interest, by its key.
        parts: Ranges of the program and backward passes of parts.
        waits: Spans in which the thread waits for a collective.
        steps: Recorded steps.
        thread: The thread that trains.
    """

    around: dict[Key, Around] = field(default_factory=dict)
    parts: list[Span] = field(default_factory=list)
    waits: list[Span] = field(default_factory=list)
    steps: dict[int, Span] = field(default_factory=dict)
    thread: Any = None


def complete(events: Iterable[Event]) -> list[Event]:
    """Events with a duration."""
    return [event for event in events if event.get("ph") == "X" and "dur" in event]


def key(event: Event) -> Key:
    """Thread and time of an event."""
    return event["tid"], event["ts"]


def span(event: Event, name: str = "", kind: str = "") -> Span:
    """An event as a span of its thread or stream."""
    start = float(event["ts"])
    return Span(name or event["name"], start, start + event["dur"], str(event["tid"]), kind)


def sweep(events: list[Event], wanted: Iterable[Event]) -> Swept:
    """Find what is around the wanted events, and the ranges.

    Args:
        events: All events of the trace.
        wanted: Host events whose surroundings are asked for.
    """
    host = [e for e in complete(events) if e.get("cat") in ("cpu_op", "user_annotation")]
    threads: dict[Any, list[Event]] = defaultdict(list)
    for event in host:
        threads[event["tid"]].append(event)
    for of_thread in threads.values():
        of_thread.sort(key=lambda event: (event["ts"], -event["dur"]))
    links = _links(events)
    keys = {key(event) for event in wanted}
    swept = Swept()
    # Parts of operations: their derivatives may run on another thread, and a recomputed forward
    # pass inside of a derivative has derivatives of its own.
    parts: dict[Key, str] = {}
    operations = set(links.values())
    for of_thread in threads.values():
        _Pass(swept, links, parts, operations, set()).run(of_thread)
    swept = Swept()
    for of_thread in threads.values():
        _Pass(swept, links, parts, operations, keys).run(of_thread)
    swept.parts.sort(key=lambda one: one.start_us)
    return swept


def _links(events: list[Event]) -> dict[Key, Key]:
    """Maps each derivative to its operation."""
    ends: dict[str, dict[Any, Key]] = {"s": {}, "f": {}}
    for event in events:
        if event.get("cat") == "fwdbwd" and event.get("ph") in ends:
            ends[event["ph"]][event["id"]] = key(event)
    return {at: ends["s"][number] for number, at in ends["f"].items() if number in ends["s"]}


class _Pass:
    """One pass over one thread's events in order of time.

    Args:
        swept: Receives the results.
        links: Maps each derivative to its operation.
        parts: Part of each operation that has a derivative; read and completed.
        operations: Operations that have one.
        keys: Events whose surroundings are asked for.
    """

    def __init__(
        self,
        swept: Swept,
        links: dict[Key, Key],
        parts: dict[Key, str],
        operations: set[Key],
        keys: set[Key],
    ) -> None:
        self._swept, self._links, self._parts = swept, links, parts
        self._operations, self._keys = operations, keys
        # End, scope or None, collective or None, whether it is a node of the graph.
        self._open: list[tuple[float, str | None, Call | None, bool]] = []
        self._backward: Span | None = None
        self._pass: Span | None = None

    def run(self, events: list[Event]) -> None:
        for event in events:
            while self._open and self._open[-1][0] <= event["ts"]:
                self._open.pop()
            self._enter(event)
        self._close_backward()
        self._close_pass()

    def _enter(self, event: Event) -> None:
        name: str = event["name"]
        at, end = key(event), event["ts"] + event["dur"]
        scope, call, is_node = None, None, False
        if name.startswith(_PREFIX):
            scope, call = self._range(event, name.removeprefix(_PREFIX))
        elif at in self._links:
            part = self._parts.get(self._links[at])
            if part is not None:
                scope = f"{part.split(':')[0]}:backward"
                self._extend_backward(event, scope)
        elif name.startswith(_NODE):
            is_node = True
            self._extend_pass(event)
        if at in self._operations:
            part = self._innermost_part()
            if part is not None:
                self._parts[at] = part
        if at in self._keys:
            self._swept.around[at] = Around(
                tuple(one[1] for one in self._open if one[1] is not None),
                next((one[2] for one in reversed(self._open) if one[2] is not None), None),
            )
        if scope is not None or call is not None or is_node:
            self._open.append((end, scope, call, is_node))

    def _range(self, event: Event, name: str) -> tuple[str | None, Call | None]:
        """The scope or collective that a range of the recorder means."""
        found = _COMM.fullmatch(name)
        if found is not None:
            pair = (int(found[2]), int(found[3])) if found[2] else None
            return None, Call(found[1], pair, int(found[4]))
        if name == "wait":
            self._swept.waits.append(span(event, "wait"))
            return None, None
        if name.startswith("step/"):
            self._swept.steps[int(name.removeprefix("step/"))] = span(event, name)
            self._swept.thread = event["tid"]
            return None, None
        is_part = _MODEL_PART.fullmatch(name) is not None
        recomputed = is_part and self._in_node()
        kind = ("recompute" if recomputed else "forward") if is_part else ""
        if not self._in_node():
            self._close_pass()
        self._swept.parts.append(span(event, name, kind))
        return (f"{name}:recompute" if recomputed else name), None

    def _in_node(self) -> bool:
        return any(one[3] for one in self._open)

    def _innermost_part(self) -> str | None:
        for _, scope, _, _ in reversed(self._open):
            if scope is not None and "/" in scope:
                return scope
        return None

    def _extend_pass(self, event: Event) -> None:
        """Outermost nodes that follow each other are one backward pass."""
        if self._in_node():
            return
        end = event["ts"] + event["dur"]
        if self._pass is None:
            self._pass = span(event, "backward")
        self._pass = Span("backward", self._pass.start_us, end, str(event["tid"]))

    def _close_pass(self) -> None:
        if self._pass is not None:
            self._swept.parts.append(self._pass)
            self._pass = None

    def _extend_backward(self, event: Event, scope: str) -> None:
        """Derivatives of one part that follow each other are one span."""
        name, end = scope.split(":")[0], event["ts"] + event["dur"]
        if self._backward is not None and self._backward.name == name:
            start = self._backward.start_us
            self._backward = Span(name, start, end, str(event["tid"]), "backward")
            return
        self._close_backward()
        self._backward = span(event, name, "backward")

    def _close_backward(self) -> None:
        if self._backward is not None:
            self._swept.parts.append(self._backward)
            self._backward = None
