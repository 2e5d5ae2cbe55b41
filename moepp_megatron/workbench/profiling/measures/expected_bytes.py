"""All-to-all bytes of each layer, direction and pass: measured, and required by the routing.

The FFN-only formula for a rank's dispatch is `T K phi D b (EP - 1) / EP`: of `T K` selections the
share `phi` goes to FFN experts, and of these `(EP - 1) / EP` to other ranks, if experts are loaded
evenly. With the step's own counts no assumption is needed: the bytes are the selections whose
expert is on another rank, times `D b`. Measured bytes must equal that exactly. Without duplicates
a token crosses once to each rank that holds an expert of it: the least that can be sent.

Gates, 4 bytes per selection, and with deduplication maps are counted separately.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from moepp_megatron.workbench.profiling.collective import Collective, Operation
from moepp_megatron.workbench.profiling.measures.purpose import Place, place_of
from moepp_megatron.workbench.profiling.trace import RankTrace


@dataclass
class ExpectedLayerBytes:
    """One layer, direction (dispatch, combine) and pass, summed over ranks and a step; bytes.

    Attributes:
        place: Layer, part and pass.
        measured: Hidden vectors that the all-to-all carried to other ranks.
        side: Bytes of gates and maps.
        expected: Bytes required by the step's routing, for the dispatcher that ran; None if the
            recorder has not counted it, or its dispatcher is not an all-to-all.
        plain: Bytes when sent once per selection (the FFN-only formula with this step's counts).
        deduplicated: Bytes when sent once per token and rank: the minimum.
        even: The FFN-only formula with an even load of experts.
        vanilla: The formula with phi = 1: every selection goes to an FFN expert.
    """

    place: Place
    measured: int = 0
    side: int = 0
    expected: int | None = None
    plain: int = 0
    deduplicated: int = 0
    even: float = 0.0
    vanilla: float = 0.0

    @property
    def is_equal(self) -> bool | None:
        """Whether measured and expected agree to the byte; None without an expectation."""
        return None if self.expected is None else self.measured == self.expected


def layer_bytes(traces: Iterable[RankTrace], step: int) -> list[ExpectedLayerBytes]:
    """Bytes over all recorded ranks, ordered by layer, dispatch before combine, forward first."""
    found: dict[Place, ExpectedLayerBytes] = {}
    for trace in traces:
        span = trace.steps.get(step)
        if span is None:
            continue
        passes = _passes(trace, step)
        row_bytes = {p["row_bytes"] for ps in passes.values() for p in ps}
        for call in trace.collectives:
            place = place_of(call)
            is_within = span.start_us <= call.start_us < span.end_us
            if place is not None and is_within and _is_exchange(call, place):
                entry = found.setdefault(place, ExpectedLayerBytes(place))
                _add_measured(entry, call, row_bytes)
        for place, counted in _places(passes):
            entry = found.setdefault(place, ExpectedLayerBytes(place))
            _add_expected(entry, counted)
    phases, parts = ("forward", "recompute", "backward"), ("dispatch", "combine")
    return sorted(
        found.values(),
        key=lambda one: (
            one.place.layer,
            phases.index(one.place.phase),
            parts.index(one.place.part),
        ),
    )


def _is_exchange(call: Collective, place: Place) -> bool:
    return call.operation is Operation.ALL_TO_ALL and place.part in ("dispatch", "combine")


def _passes(trace: RankTrace, step: int) -> dict[tuple[int, bool], list[dict[str, Any]]]:
    """Counted passes by layer, and by whether they were repeated."""
    found: dict[tuple[int, bool], list[dict[str, Any]]] = defaultdict(list)
    for entry in trace.about.get("steps", []):
        if entry["step"] == step:
            for counted in entry.get("passes", []):
                found[counted["layer"], counted["recomputed"]].append(counted)
    return found


def _places(
    passes: dict[tuple[int, bool], list[dict[str, Any]]],
) -> Iterable[tuple[Place, dict[str, Any]]]:
    """Each counted pass under every place that moves its tokens.

    The backward pass moves the tokens of the last forward pass: the repeated one, if there is one.
    """
    for (layer, recomputed), counted in passes.items():
        phases = ["recompute" if recomputed else "forward"]
        if recomputed or (layer, True) not in passes:
            phases.append("backward")
        for one in counted:
            for phase in phases:
                for part in ("dispatch", "combine"):
                    yield Place(layer, part, phase), one


def _add_measured(entry: ExpectedLayerBytes, call: Collective, row_bytes: set[int]) -> None:
    others = _to_others(call, entry.place)
    # Gates and maps travel beside hidden vectors; a row tells which is which.
    if row_bytes and call.row_bytes is not None and call.row_bytes not in row_bytes:
        entry.side += others
    else:
        entry.measured += others


def _to_others(call: Collective, place: Place) -> int:
    """Bytes exchanged between this rank, which has the tokens, and the experts' ranks.

    Dispatch sends them out and combine brings them back; gradients go the other way.
    """
    outward = (place.part == "dispatch") == (place.phase != "backward")
    parts = call.sent if outward else call.received
    if parts is None or call.rank not in call.group_ranks:
        return call.size or 0
    own = call.group_ranks.index(call.rank)
    return sum(size for rank, size in enumerate(parts) if rank != own)


def _add_expected(entry: ExpectedLayerBytes, counted: dict[str, Any]) -> None:
    row, own, ranks = counted["row_bytes"], counted["own"], counted["ranks"]

    def to_others(rows: list[int]) -> int:
        return row * sum(count for rank, count in enumerate(rows) if rank != own)

    plain, copies = to_others(counted["to_ranks"]), to_others(counted["copies_to_ranks"])
    entry.plain += plain
    entry.deduplicated += copies
    share = (ranks - 1) / ranks
    # T K phi is the number of FFN selections.
    entry.even += counted["selections"] * row * share
    entry.vanilla += counted["tokens"] * counted["topk"] * row * share
    expected = {"Dedup": copies, "Allto": plain}
    for part, value in expected.items():
        if part.lower() in counted["dispatcher"].lower():
            entry.expected = (entry.expected or 0) + value
            return
