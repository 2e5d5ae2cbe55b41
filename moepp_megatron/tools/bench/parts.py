"""Measures the forward time of each part of a layer."""

from __future__ import annotations

import functools
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from moepp_megatron.runtime.patches import Replacements
from moepp_megatron.tools.bench import clock

# Part to methods of megatron-core's `MoELayer` and of ours. What they leave is "rest". Where one
# kernel combines and adds up zero-computation experts, all of it is "combine" but the product of
# the mixing weights.
_PARTS = {
    "router": (("", "route"), ("router", "forward")),
    "dispatch": (("", "preprocess"), ("", "dispatch")),
    "experts": (("", "routed_experts_compute"),),
    "combine": (("", "combine"), ("", "postprocess"), ("", "fused_output")),
    "zero_computation": (("zero_computation", "forward"), ("zero_computation", "ingredients")),
}


@dataclass
class _Span:
    """A call of a part's method, between two points in time, and the calls inside it."""

    part: str
    begin: Any
    end: Any = None
    inner: list[_Span] = field(default_factory=list)

    def add_to(self, seconds: dict[str, float]) -> float:
        """Add the time of this part without the parts inside it; returns its whole time."""
        total = clock.seconds(self.begin, self.end)
        inside = sum(span.add_to(seconds) for span in self.inner)
        seconds[self.part] += total - inside
        return total


def parts_ms(layer: Any, forward: Callable[[], object], rounds: int) -> dict[str, float]:
    """Median milliseconds per part over `rounds` forward passes; `rest` is the remainder.

    Args:
        layer: megatron-core's MoE layer or the MoE++ layer; left as it was.
        forward: Runs it once.
        rounds: Passes to time, after one that is not counted.
    """
    seconds: dict[str, list[float]] = defaultdict(list)
    open_spans: list[_Span] = []
    replacements = Replacements()
    for part, methods in _PARTS.items():
        for owner_name, method in methods:
            owner = getattr(layer, owner_name, None) if owner_name else layer
            if owner is not None and hasattr(owner, method):
                wrapped = _timed(getattr(owner, method), part, open_spans)
                replacements.put(owner, method, wrapped)
    try:
        for number in range(rounds + 1):
            clock.settle()
            whole = _Span("rest", clock.now())
            open_spans[:] = [whole]
            forward()
            whole.end = clock.now()
            clock.settle()
            if number > 0:
                current: dict[str, float] = defaultdict(float)
                whole.add_to(current)
                for part, value in current.items():
                    seconds[part].append(value)
    finally:
        replacements.undo()
    return {part: statistics.median(values) * 1e3 for part, values in seconds.items()}


def _timed(function: Callable[..., Any], part: str, open_spans: list[_Span]) -> Callable[..., Any]:
    @functools.wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        span = _Span(part, clock.now())
        open_spans[-1].inner.append(span)
        open_spans.append(span)
        try:
            return function(*args, **kwargs)
        finally:
            open_spans.pop()
            span.end = clock.now()

    return timed
