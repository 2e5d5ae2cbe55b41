"""Names for the parts of a model in profiler traces: `moepp/layer3/dispatch`.

A range is put around a method by replacing it on the object while a profile is recorded, and taken
away afterwards. So ranges cost nothing when they are off: there is no switch to ask, and no line of
the layer knows of them.

Names are of the forward pass. A trace links every operation with its derivative, so it tells the
backward pass of a part; and a recomputed forward pass by the derivative that it runs in
(`profiling.formats.kineto`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch.profiler import record_function

from moepp_megatron.runtime.patches import Replacements

PREFIX = "moepp/"

Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]


class Ranges(Replacements):
    """Methods wrapped for a while; `undo` removes the wrappers."""

    def replace(self, owner: Any, method: str, wrapper: Wrapper) -> None:
        """Put `wrapper(method)` in the place of a method, of a class or of one object."""
        self.put(owner, method, wrapper(getattr(owner, method)))

    def around(self, owner: Any, method: str, name: str) -> None:
        """Show calls of a method as `moepp/NAME` in the trace."""
        self.replace(owner, method, functools.partial(_named, name))


@contextmanager
def range_(name: str) -> Iterator[None]:
    """A range `moepp/NAME` for torch's profiler and, on a GPU, for Nsight (NVTX)."""
    name = PREFIX + name
    with record_function(name):
        if not torch.cuda.is_available():
            yield
            return
        torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            torch.cuda.nvtx.range_pop()


def _named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function in a range."""

    @functools.wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        with range_(name):
            return function(*args, **kwargs)

    return inner


def name_layers(ranges: Ranges, model: torch.nn.Module) -> None:
    """Put ranges around the parts of every layer of a model or model chunk.

    MoE layers, ours and megatron-core's: router, dispatch, experts, zero_computation,
    shared_experts, combine. All layers: attention; those without experts: ffn. Around them:
    `model/embedding`, `model/output_layer`, `model/loss`.
    """
    for owner, method, part in (
        (getattr(model, "embedding", None), "forward", "embedding"),
        (getattr(model, "output_layer", None), "forward", "output_layer"),
        (model, "compute_language_model_loss", "loss"),
    ):
        if owner is not None and hasattr(owner, method):
            ranges.around(owner, method, f"model/{part}")
    for module in model.modules():
        if isinstance(module, MoELayer):
            _name_moe(ranges, module)
        elif hasattr(module, "self_attention") and hasattr(module, "layer_number"):
            layer = f"layer{module.layer_number}"
            ranges.around(module.self_attention, "forward", f"{layer}/attention")
            mlp = getattr(module, "mlp", None)
            if mlp is not None and not isinstance(mlp, MoELayer):
                ranges.around(mlp, "forward", f"{layer}/ffn")


def _name_moe(ranges: Ranges, layer: MoELayer) -> None:
    dispatcher = layer.token_dispatcher
    parts: list[tuple[str, Any, tuple[str, ...]]] = [
        ("router", layer.router, ("forward",)),
        ("dispatch", layer, ("preprocess", "dispatch")),
        ("dispatch", dispatcher, ("dispatch_postprocess",)),
        ("experts", layer.experts, ("forward",)),
        ("shared_experts", getattr(layer, "shared_experts", None), ("forward",)),
        ("zero_computation", getattr(layer, "zero_computation", None), ("forward", "ingredients")),
        ("combine", dispatcher, ("combine_preprocess", "combine_rows")),
        ("combine", layer, ("combine", "postprocess")),
    ]
    for part, owner, methods in parts:
        for method in methods:
            if owner is not None and hasattr(owner, method):
                ranges.around(owner, method, f"layer{layer.layer_number}/{part}")
