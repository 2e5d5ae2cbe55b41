"""All-to-all bytes of each layer, direction and pass: measured, and required by the routing.

The FFN-only formula for a rank's dispatch is `T K phi D b (EP - 1) / EP`: of `T K` selections the
share `phi` goes to FFN experts, and of these `(EP - 1) / EP` to other ranks, if experts are loaded
evenly. With the step's own counts no assumption is needed: the bytes are the selections whose
expert is on another rank, times `D b`. Measured bytes must equal that exactly. Without duplicates
a token crosses once to each rank that holds an expert of it: the least that can be sent.

Gates, 4 bytes per selection, and with deduplication maps are counted separately.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from moepp_megatron.tools.profiling.measures.purpose import Place, place_of
from moepp_megatron.tools.profiling.trace import Collective, Operation, Pass, RankTrace

_PHASES, _PARTS = ("forward", "recompute", "backward"), ("dispatch", "combine")


@dataclass
class ExpectedLayerBytes:
    """One layer, direction (dispatch, combine) and pass, summed over ranks and a step; bytes."""

    place: Place
    measured: int = 0  # hidden vectors that the all-to-all carried to other ranks
    side: int = 0  # gates and maps
    # Required by the step's routing, for the dispatcher that ran; None if the recorder has not
    # counted it, or its dispatcher is not an all-to-all.
    expected: int | None = None
    ffn_only: int = 0  # sent once per selection: the FFN-only formula with this step's counts
    deduplicated: int = 0  # sent once per token and rank: the minimum
    vanilla: float = 0.0  # the formula with phi = 1 and an even load

    @property
    def is_equal(self) -> bool | None:
        """True if measured and expected agree to the byte; None without an expectation."""
        return None if self.expected is None else self.measured == self.expected

    def add_measured(self, call: Collective, row_bytes: set[int]) -> None:
        """Count an all-to-all; `row_bytes` are those of the layers' hidden vectors."""
        others = _to_others(call, self.place)
        # Gates and maps travel with hidden vectors; a row distinguishes them.
        if row_bytes and call.row_bytes is not None and call.row_bytes not in row_bytes:
            self.side += others
        else:
            self.measured += others

    def add_expected(self, counted: Pass) -> None:
        """Count what the routing of a pass requires."""
        row, share = counted.row_bytes, (counted.ranks - 1) / counted.ranks
        plain, copies = (
            row * (sum(rows) - sum(rows[counted.own : counted.own + 1]))
            for rows in (counted.to_ranks, counted.copies_to_ranks)
        )
        self.ffn_only += plain
        self.deduplicated += copies
        self.vanilla += counted.tokens * counted.topk * row * share
        for kind, required in (("dedup", copies), ("allto", plain)):
            if kind in counted.dispatcher.lower():
                self.expected = (self.expected or 0) + required
                return


def layer_bytes(traces: list[RankTrace], step: int) -> list[ExpectedLayerBytes]:
    """Bytes over all recorded ranks, ordered by layer, dispatch before combine, forward first."""
    by_place: dict[Place, ExpectedLayerBytes] = {}
    for trace in [trace for trace in traces if step in trace.steps]:
        span, passes = trace.steps[step], trace.passes(step)
        row_bytes = {counted.row_bytes for counted in passes}
        for call in trace.collectives:
            place = place_of(call)
            within = span.start_us <= call.start_us < span.end_us
            exchanges = call.operation is Operation.ALL_TO_ALL and within
            if exchanges and place and place.part in _PARTS and place.phase in _PHASES:
                entry = by_place.setdefault(place, ExpectedLayerBytes(place))
                entry.add_measured(call, row_bytes)
        for place, counted in _places(passes):
            by_place.setdefault(place, ExpectedLayerBytes(place)).add_expected(counted)
    return [by_place[place] for place in sorted(by_place, key=_order)]


def _order(place: Place) -> tuple[int, int, int]:
    return place.layer, _PHASES.index(place.phase), _PARTS.index(place.part)


def _places(passes: list[Pass]) -> Iterator[tuple[Place, Pass]]:
    """Each counted pass under every place that moves its tokens."""
    # The backward pass moves those of the last forward pass: the repeated one, if there is one.
    repeated = {run.layer for run in passes if run.recomputed}
    for run in passes:
        phases = ["recompute" if run.recomputed else "forward"]
        if run.recomputed or run.layer not in repeated:
            phases.append("backward")
        for phase in phases:
            for part in _PARTS:
                yield Place(run.layer, part, phase), run


def _to_others(call: Collective, place: Place) -> int:
    """Bytes exchanged between this rank, which has the tokens, and the experts' ranks."""
    # Dispatch sends them out and combine brings them back; gradients go the other way.
    outward = (place.part == "dispatch") == (place.phase != "backward")
    parts = call.sent if outward else call.received
    if parts is None or call.rank not in call.group_ranks:
        return call.size or 0
    own_place = call.group_ranks.index(call.rank)
    return sum(size for rank, size in enumerate(parts) if rank != own_place)
