"""The data of the page's timeline: for each step, the lanes of each rank and their items.

Times are microseconds after the step's first start; a step ends with its slowest rank.
"""

from __future__ import annotations

from typing import Any

from moepp_megatron.workbench.profiling.analysis import Profile
from moepp_megatron.workbench.profiling.measures.classes import class_name
from moepp_megatron.workbench.profiling.trace import RankTrace, Span
from moepp_megatron.workbench.report import formatting

# Okabe and Ito's palette where it goes far enough.
COLOURS = {
    "attention": "#56b4e9", "router": "#cc79a7", "dispatch": "#d55e00", "experts": "#0072b2",
    "shared_experts": "#4f7fb5", "ffn": "#4f7fb5", "zero_computation": "#009e73",
    "combine": "#e69f00", "gradient reduce": "#7b5ea7", "parameter gather": "#a65e2e",
    "optimizer": "#8a9a5b", "pipeline": "#b5495b", "tensor parallel": "#2f8f9d",
    "context parallel": "#6f7f2f", "embedding": "#c9b98a", "output_layer": "#86644b",
    "loss": "#74744f", "forward": "#dfe4ea", "backward": "#c3cbd5", "computation": "#9aa5b1",
    "waiting": "#e12d39", "other": "#9aa5b1",
}  # fmt: skip
_NUMBERS = {kind: number for number, kind in enumerate(COLOURS)}
_STEP_PARTS = {
    "gradients": "gradient reduce",
    "gradient_reduce": "gradient reduce",
    "parameter_gather": "parameter gather",
}
# Rectangles that no screen resolves only make the page heavy.
_MOST = 6000


def timeline(profile: Profile) -> dict[str, Any]:
    """JSON data: `steps` of `lanes` of `items` [kind, start, duration, label, detail, waiting]."""
    return {
        "kinds": [{"name": kind, "colour": colour} for kind, colour in COLOURS.items()],
        "steps": [_step(profile, step) for step in profile.steps],
    }


def _step(profile: Profile, step: int) -> dict[str, Any]:
    traces = [trace for trace in profile.traces if step in trace.steps]
    begin = min(trace.steps[step].start_us for trace in traces)
    end = max(trace.steps[step].end_us for trace in traces)
    lanes = [lane for trace in traces for lane in _View(profile, trace, (begin, end)).lanes()]
    shown = [lane for lane in lanes if lane["items"]]
    return {"step": step, "duration": round(end - begin, 1), "lanes": shown}


class _View:
    """One rank in one step; `window` is the step's start and end."""

    def __init__(self, profile: Profile, trace: RankTrace, window: tuple[float, float]) -> None:
        self._profile, self._trace, self._window = profile, trace, window

    def lanes(self) -> list[dict[str, Any]]:
        trace = self._trace
        layers = [span for span in trace.parts if span.kind]
        outer = [span for span in trace.parts if not span.kind]
        result = [
            self._lane("step", [self._part(span) for span in self._visible(outer)]),
            self._lane("layers", [self._layer(span) for span in self._visible(layers)]),
        ]
        if not trace.on_gpu:
            waits = [self._item("waiting", span, "waits") for span in self._visible(trace.waits)]
            result.append(self._lane("waits", waits))
        streams: dict[str, list[Span]] = {}
        for span in trace.kernels:
            streams.setdefault(span.lane, []).append(span)
        for stream, spans in streams.items():
            visible = _thinned(self._visible(spans))
            items = [self._item("computation", span, span.name) for span in visible]
            result.append(self._lane(f"stream {stream}", items))
        result += self._communication()
        return result

    def _communication(self) -> list[dict[str, Any]]:
        """One lane per stream on a GPU; on a CPU as few lanes as overlapping calls need."""
        lanes: list[tuple[str, float, list[list[Any]]]] = []
        for place, call in enumerate(self._trace.collectives):
            if not self._is_visible(call.start_us, call.end_us):
                continue
            item = self._collective(place)
            name = f"stream {call.stream} (NCCL)" if self._trace.on_gpu else "communication"
            for number, (lane, end, items) in enumerate(lanes):
                if lane == name and (self._trace.on_gpu or end <= call.start_us):
                    items.append(item)
                    lanes[number] = (lane, call.end_us, items)
                    break
            else:
                lanes.append((name, call.end_us, [item]))
        return [self._lane(name, items) for name, _, items in lanes]

    def _collective(self, place: int) -> list[Any]:
        trace, call = self._trace, self._trace.collectives[place]
        name, late = class_name(trace, call), self._profile.late.get((trace.rank, place))
        details = [f"{call.operation}, {name.group} group of {call.group_size}"]
        scope = next((one for one in reversed(call.scopes) if one.startswith("layer")), None)
        if scope is not None:
            details.append(f"{scope.split(':')[0]}, {name.phase}")
        if call.size is not None:
            details.append(formatting.data_size(call.size))
        if call.bus_bandwidth is not None:
            details.append(f"bus {call.bus_bandwidth:.3g} GB/s, waiting included")
        if late is not None and late.wait_us > 0:
            details.append(f"waits {late.wait_us / 1e3:.3f} ms for rank {late.last_rank}")
        span = Span(name.purpose, call.start_us, call.end_us)
        item = self._item(name.purpose, span, name.purpose, "\n".join(details))
        return [*item, round(late.wait_us, 1)] if late is not None else item

    def _layer(self, span: Span) -> list[Any]:
        layer, part = span.name.split("/")
        words, short = part.replace("_", " "), {"recompute": " recompute", "backward": " bwd"}
        is_layer = layer.startswith("layer")
        label = f"L{layer.removeprefix('layer')} {words}" if is_layer else words
        where = layer.replace("layer", "layer ")
        detail = f"{where}, {words}, {span.kind}"
        return self._item(part, span, label + short.get(span.kind, ""), detail)

    def _part(self, span: Span) -> list[Any]:
        kind = _STEP_PARTS.get(span.name, span.name)
        return self._item(kind, span, span.name.replace("_", " "))

    def _item(self, kind: str, span: Span, label: str, detail: str = "") -> list[Any]:
        begin, end = self._window
        start, stop = max(span.start_us, begin), min(span.end_us, end)
        number = _NUMBERS.get(kind, _NUMBERS["other"])
        return [number, round(start - begin, 1), round(stop - start, 1), label, detail]

    def _lane(self, name: str, items: list[list[Any]]) -> dict[str, Any]:
        return {
            "rank": self._trace.rank,
            "name": name,
            "items": sorted(items, key=lambda item: (item[1], -item[2])),
        }

    def _visible(self, spans: list[Span]) -> list[Span]:
        return [span for span in spans if self._is_visible(span.start_us, span.end_us)]

    def _is_visible(self, start: float, end: float) -> bool:
        return end > self._window[0] and start < self._window[1]


def _thinned(spans: list[Span]) -> list[Span]:
    """Reduce to about `_MOST` spans: neighbours with hardly a gap between them are joined."""
    spans = sorted(spans, key=lambda span: span.start_us)
    gap = 0.5
    while len(spans) > _MOST:
        merged: list[Span] = []
        for span in spans:
            last = merged[-1] if merged else None
            if last is not None and span.start_us - last.end_us < gap:
                end = max(last.end_us, span.end_us)
                merged[-1] = Span("several kernels", last.start_us, end, last.lane)
            else:
                merged.append(span)
        spans, gap = merged, gap * 2
    return spans
