"""Where the forward time of a layer goes."""

from __future__ import annotations

import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

# Part to methods of megatron-core's `MoELayer` and of ours. What they leave is "rest".
_PARTS = {
    "router": (("", "route"), ("router", "forward")),
    "dispatch": (("", "preprocess"), ("", "dispatch")),
    "experts": (("", "routed_experts_compute"),),
    "combine": (("", "combine"), ("", "postprocess")),
    "zero_computation": (("zero_computation", "forward"),),
}


def parts_ms(layer: Any, forward: Callable[[], object], rounds: int) -> dict[str, float]:
    """Median milliseconds a part, of `rounds` forward passes; `rest` is what no part claims.

    Args:
        layer: megatron-core's MoE layer or the MoE++ layer; left as it was.
        forward: Runs it once.
        rounds: Passes to time, after one that is not counted.
    """
    seconds: dict[str, list[float]] = defaultdict(list)
    current: dict[str, float] = {}
    originals: list[tuple[Any, str]] = []
    for part, methods in _PARTS.items():
        for owner_name, method in methods:
            owner = getattr(layer, owner_name, None) if owner_name else layer
            if owner is not None and hasattr(owner, method):
                setattr(owner, method, _timed(getattr(owner, method), part, current))
                originals.append((owner, method))
    try:
        forward()
        for _ in range(rounds):
            current.clear()
            began = _now()
            forward()
            current["rest"] = _now() - began - sum(current.values())
            for part, value in current.items():
                seconds[part].append(value)
    finally:
        for owner, method in originals:
            delattr(owner, method)
    return {part: statistics.median(values) * 1e3 for part, values in seconds.items()}


def _timed(
    function: Callable[..., Any], part: str, current: dict[str, float]
) -> Callable[..., Any]:
    @functools.wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        # Parts do not nest, but two methods may be one part, one inside the other.
        began, before = _now(), current.get(part, 0.0)
        result = function(*args, **kwargs)
        current[part] = before + _now() - began
        return result

    return timed


def _now() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()
