"""`moepp bench layer`: the MoE++ layer against the vanilla layer at the paper's shapes and taus.

A result is what `--json` writes of a shape, tau and pass:

    shape, tau, dtype, tokens     the paper's name of the model, weight of a zero-computation expert
    phi                           FFN experts' share of all selections
    pass                          forward or forward_backward
    speedup                       vanilla time over MoE++ time, median of the rounds' ratios
    efficiency                    speedup times phi: how much of the possible speed-up is reached
    paper_efficiency              the same from the paper's expert forward times; null without them
    overhead                      forward time of MoE++ but for FFN experts, over vanilla's time
    fp8_recipe, constants, fused  recipe of fp8, constant experts and `moe.fused` of MoE++
    device, matmul_tflops, copy_gb_s
                                  the GPU, and its measured matrix product and copy (`bounds.py`)

and of each layer, with vanilla_ or moepp_ in front:

    ms, kept_bytes                median of the pass; bytes that autograd keeps
    parts_ms, bounds_ms           median of each part of a forward pass, and its bound
    tflops, experts_tflops        FLOPs of FFN experts over the pass; forward, over their own part
    experts                       class of the FFN experts
"""

from __future__ import annotations

import functools
import gc
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moepp_megatron.layer_settings import Fused
from moepp_megatron.runtime.patches import Replacements
from moepp_megatron.tools.bench import clock
from moepp_megatron.tools.bench.bounds import CardResult, bounds_ms, measure_card
from moepp_megatron.tools.bench.clock import interleaved, speedup
from moepp_megatron.tools.bench.contestants import Contestant
from moepp_megatron.tools.bench.shapes import PaperShape


def run_layer_benchmark(
    shapes: Sequence[PaperShape],
    taus: Sequence[float],
    passes: Sequence[str],
    *,
    dtype: str,
    tokens: int,
    rounds: int,
    fp8_recipe: str = "delayed",
    fused: Fused = "auto",
    progress: Callable[[str], object] = lambda what: None,
) -> Iterator[dict[str, Any]]:
    """Yield one result per shape, tau and pass; process groups must exist.

    `passes` are "forward" and "forward_backward", with `tokens` tokens each, and a result takes
    `rounds` interleaved rounds. `progress` is called with a description of each measurement. The
    other arguments are those of `Contestant`.
    """
    card = measure_card(("fp32", dtype))
    common = {
        "dtype": dtype,
        "tokens": tokens,
        "fp8_recipe": fp8_recipe if dtype == "fp8" else None,
        "fused": fused,
        "device": card.device,
        "matmul_tflops": card.matmul_tflops[dtype],
        "copy_gb_s": card.copy_gb_s,
    }
    build = partial(Contestant, dtype=dtype, num_tokens=tokens, fp8_recipe=fp8_recipe, fused=fused)
    for shape in shapes:
        # Its routing does not depend on tau.
        vanilla = build(shape, 1.0, vanilla=True)
        for tau in taus:
            moepp = build(shape, tau, vanilla=False)
            for name in passes:
                progress(f"{shape.name}, tau {tau:g}, {name.replace('_', ' and ')}")
                layers = {"vanilla": vanilla, "moepp": moepp}
                yield {
                    "shape": shape.name,
                    "tau": tau,
                    "pass": name,
                    "phi": shape.experts.phi(tau),
                    "paper_efficiency": shape.paper_efficiency(tau),
                    "constants": shape.experts.num_constant_experts,
                    **common,
                    **_measure(shape, tau, name, layers, rounds, card),
                }
            del moepp, layers
            gc.collect()
        del vanilla
        gc.collect()


def _measure(
    shape: PaperShape,
    tau: float,
    name: str,
    layers: dict[str, Contestant],
    rounds: int,
    card: CardResult,
) -> dict[str, Any]:
    method = {"forward": "forward_only", "forward_backward": "forward_backward"}[name]
    works = {key: getattr(layer, method) for key, layer in layers.items()}
    times = interleaved(works, rounds, warmup=2, queued=True)
    result: dict[str, Any] = {}
    for key, layer in layers.items():
        parts = parts_ms(layer.layer, layer.forward_only, rounds)
        flops = layer.work["experts"].flops
        # Forward and backward take three times as many as forward.
        passes = 1 if name == "forward" else 3
        numbers = {
            "ms": times[key].median_ms,
            "kept_bytes": _kept_bytes(layer.forward, list(layer.layer.parameters())),
            "parts_ms": parts,
            "bounds_ms": bounds_ms(layer.work, card),
            "tflops": passes * flops / times[key].median_ms / 1e9,
            "experts_tflops": flops / parts["experts"] / 1e9,
            "experts": layer.experts,
        }
        result |= {f"{key}_{number}": found for number, found in numbers.items()}
    faster = speedup(times["vanilla"], times["moepp"])
    parts = result["moepp_parts_ms"]
    return result | {
        "speedup": faster,
        "efficiency": faster * shape.experts.phi(tau),
        "overhead": (sum(parts.values()) - parts["experts"])
        / sum(result["vanilla_parts_ms"].values()),
    }


def _kept_bytes(forward: Callable[[], Tensor], parameters: list[Tensor]) -> int:
    """Count what autograd keeps after `forward`, each storage once, parameters left out."""
    parameter_storages = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}
    # Held until the end: a freed address could be taken again and be counted as the same.
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameter_storages:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(kept.values())


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
    """Return median milliseconds per part over `rounds` forward passes; `rest` is the remainder.

    `layer` is megatron-core's MoE layer or the MoE++ layer and is left as it was; `forward` runs it
    once. A first pass is not counted.
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
            clock.synchronize()
            whole = _Span("rest", clock.now())
            open_spans[:] = [whole]
            forward()
            whole.end = clock.now()
            clock.synchronize()
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
