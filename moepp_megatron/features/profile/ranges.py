"""Names for parts of a model and collectives in profiler traces: `moepp/layer3/dispatch`.

A range is put around a method by replacing it on the object while a profile is recorded, and taken
away afterwards. So ranges cost nothing when they are off: there is no switch to ask, and no line of
the layer knows of them.

NCCL's kernels name their group in a trace. gloo's do not, and neither says which call on one rank
belongs to which on another. So every collective is in a range `moepp/comm/GROUP/NUMBER/METHOD`:
NUMBER counts the calls of a group, which are in the same order on all of its ranks. Sends and
receives are counted by direction, with ranks in the group: `moepp/comm/GROUP/FROM>TO.NUMBER/send`.
On a CPU the thread that trains waits in `Work.wait`: it is in a range `moepp/wait`.

Names are of the forward pass. A trace links every operation with its derivative, so it tells the
backward pass of a part; and a recomputed forward pass by the derivative that it runs in
(`profiling.formats.kineto`).
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch.profiler import record_function

from moepp_megatron.runtime.patches import Replacements

_PREFIX = "moepp/"

_Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]

# The doors of c10d, whatever function they are called by. Names differ between torch versions.
_METHODS = (
    "_allgather_base",
    "_reduce_scatter_base",
    "all_gather_single",
    "all_gather_single_coalesced",
    "all_to_all_single",
    "allgather",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall",
    "alltoall_base",
    "barrier",
    "broadcast",
    "gather",
    "gather_single",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced",
    "scatter",
)
_TO_ONE = ("send", "recv")


class Ranges(Replacements):
    """Methods wrapped for a while; `undo` removes the wrappers."""

    def replace(self, owner: Any, method: str, wrapper: _Wrapper) -> None:
        """Put `wrapper(method)` in the place of a method, of a class or of one object."""
        self.put(owner, method, wrapper(getattr(owner, method)))

    def around(self, owner: Any, method: str, name: str) -> None:
        """Show calls of a method as `moepp/NAME` in the trace."""
        self.replace(owner, method, functools.partial(_named, name))

    def name_layers(self, model: torch.nn.Module) -> None:
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
            if hasattr(owner, method):
                self.around(owner, method, f"model/{part}")
        for module in model.modules():
            if isinstance(module, MoELayer):
                self._name_moe(module)
            elif hasattr(module, "self_attention") and hasattr(module, "layer_number"):
                layer = f"layer{module.layer_number}"
                self.around(module.self_attention, "forward", f"{layer}/attention")
                mlp = getattr(module, "mlp", None)
                if mlp is not None and not isinstance(mlp, MoELayer):
                    self.around(mlp, "forward", f"{layer}/ffn")

    def _name_moe(self, layer: MoELayer) -> None:
        dispatcher = layer.token_dispatcher
        parts: list[tuple[str, Any, tuple[str, ...]]] = [
            ("router", layer.router, ("forward",)),
            ("dispatch", layer, ("preprocess", "dispatch")),
            ("dispatch", dispatcher, ("dispatch_postprocess",)),
            ("experts", layer.experts, ("forward",)),
            ("shared_experts", getattr(layer, "shared_experts", None), ("forward",)),
            (
                "zero_computation",
                getattr(layer, "zero_computation", None),
                ("forward", "ingredients"),
            ),
            ("combine", dispatcher, ("combine_preprocess", "combine_rows")),
            ("combine", layer, ("combine", "postprocess")),
        ]
        for part, owner, methods in parts:
            for method in methods:
                if hasattr(owner, method):
                    self.around(owner, method, f"layer{layer.layer_number}/{part}")

    def name_collectives(self) -> None:
        """Put ranges around every collective from now on, numbered from 0."""
        calls: Counter[tuple[str, str]] = Counter()

        def numbered(method: str, function: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(function)
            def inner(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
                ends = ""
                if method in _TO_ONE:
                    # After the tensors comes the other rank.
                    pair = (group.rank(), args[1]) if method == "send" else (args[1], group.rank())
                    ends = f"{pair[0]}>{pair[1]}."
                key = group.group_name, ends
                number = calls[key]
                calls[key] += 1
                with record_function(f"{_PREFIX}comm/{group.group_name}/{ends}{number}/{method}"):
                    return function(group, *args, **kwargs)

            return inner

        for method in (*_METHODS, *_TO_ONE):
            if hasattr(dist.ProcessGroup, method):
                self.replace(dist.ProcessGroup, method, functools.partial(numbered, method))
        if dist.get_backend() == "gloo":
            self.around(dist.Work, "wait", "wait")


@contextmanager
def range_(name: str) -> Iterator[None]:
    """A range `moepp/NAME` for torch's profiler and, on a GPU, for Nsight (NVTX)."""
    name = _PREFIX + name
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
