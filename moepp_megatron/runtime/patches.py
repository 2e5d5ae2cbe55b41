"""Every change that this package makes to another library's objects, and the only ways to make one.

The libraries stay unmodified on disk. What they offer no setting for is replaced in memory: for
good by `replace`, for a while by `replaced` or `Replacements`. `PATCHES` says of each module that
does so what it replaces, why, and when that can go; a test checks the sources. Python's own
hooks (`sys.unraisablehook`, `threading.excepthook`) are made to be set and are none of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class _Patch:
    """A replacement: who makes it, of what and for how long, why, and until when."""

    module: str
    library: str
    what: str
    why: str
    until: str


PATCHES = (
    _Patch(
        "runtime.cpu_support",
        "torch, megatron-core",
        "streams, events, device queries, random states, factories, uneven collectives, "
        "devices of gloo groups, torch.compile; for good, "
        "in a process without a GPU",
        "megatron-core asks for CUDA where nothing depends on a GPU",
        "megatron-core trains on CPU ranks by itself",
    ),
    _Patch(
        "runtime.agent",
        "torch",
        "SimpleElasticAgent._restart_workers; for good, in torchrun's own process",
        "a user's error would be tried again",
        "torchrun has a setting for failures that are final",
    ),
    _Patch(
        "training.checkpoint.save",
        "megatron-core",
        "filesystem_async._results_queue; for good",
        "a server process would be started for a queue that nothing reads",
        "a save can be planned without a queue",
    ),
    _Patch(
        "training.checkpoint.save",
        "torch",
        "storage_meta of one writer; for good",
        "a path would be stored as an object, which another Python cannot unpickle",
        "torch stores no path",
    ),
    _Patch(
        "training.checkpoint.data_only",
        "megatron-core",
        "FileSystemReader of its strategies; while a checkpoint is read",
        "the index would be unpickled without restrictions",
        "megatron-core takes a reader for the common state",
    ),
    _Patch(
        "training.setup",
        "Transformer Engine",
        "fuse_wgrad_accumulation of its layers; for good, where megatron-core has left it off",
        "weight gradients would be written and added to their buffers in a pass of its own",
        "megatron-core's output layer can be built with its setting where apex is not there",
    ),
    _Patch(
        "interop.vllm.model",
        "vLLM",
        "set_capture_fn of the router of one layer's FFN experts; for good",
        "it would record rows of FFN experts where the gate records the picks of tokens",
        "vLLM captures only routers that ask for it",
    ),
    _Patch(
        "interop.megatron_lm",
        "Megatron-LM",
        "checkpointing._maybe_setup_gpt_to_hybrid_load; for good, where its loop builds this "
        "package's model",
        "it would translate the names of layers, or refuse a checkpoint without a pattern",
        "it looks at names instead of classes",
    ),
    _Patch(
        "moe.stack",
        "megatron-core",
        "the numbers of layers of the first and the last stage in one TransformerConfig; while a "
        "model is built",
        "HybridModel refuses them beside a pattern that has the stages",
        "HybridModel takes both",
    ),
    _Patch(
        "training.step",
        "megatron-core",
        "prepare_grads and get_grad_norm of one optimizer; for one step",
        "both would be computed twice where the norm is looked at before the step",
        "the optimizer's step takes a norm",
    ),
    _Patch(
        "features.tasks.part",
        "megatron-core",
        "moe_expert_capacity_factor and moe_input_jitter_eps of the model's configuration, and the "
        "capacity of this package's routers; while tasks are evaluated",
        "a token's score would depend on the other tokens, and on noise",
        "megatron-core limits and disturbs only in training",
    ),
    _Patch(
        "training.resilience.stragglers",
        "torch, megatron-core",
        "collectives under every name, and Work.wait; while the clock runs",
        "neither gloo nor NCCL says how long a rank waits",
        "torch reports the time of a collective",
    ),
    _Patch(
        "training.step_sums",
        "megatron-core",
        "clip_grads.l2_norm_impl; for good, on a GPU without Transformer Engine and apex",
        "the host waits for the device once a parameter",
        "megatron-core's own norm is one read",
    ),
    _Patch(
        "features.profile.ranges",
        "torch, megatron-core",
        "methods of layers, process groups and Work; while a profile is recorded",
        "parts of a layer have no names in a trace",
        "never: names are this package's",
    ),
    _Patch(
        "tools.bench.layer",
        "megatron-core",
        "methods of one layer; while it is timed",
        "parts of a layer have no times",
        "never: parts are this package's",
    ),
    _Patch(
        "tools.bench.step",
        "torch",
        "all_to_all_single; in steps that are not timed",
        "neither gloo nor NCCL reports how long it takes",
        "torch reports the time of a collective",
    ),
    _Patch(
        "tools.bench.held_routing",
        "megatron-core",
        "gating, or the last step of it, of one router; for good, in a benchmark",
        "timed layers must have the same load",
        "never: it is the benchmark's purpose",
    ),
)


def replace(owner: Any, name: str, value: Any) -> None:
    """Permanently replace an attribute of a module, a class or an object."""
    setattr(owner, name, value)


@contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Replace attributes of `owner` in the block."""
    replacements = Replacements()
    for name, value in values.items():
        replacements.put(owner, name, value)
    try:
        yield
    finally:
        replacements.undo()


class Replacements:
    """Attributes replaced for a while, of many owners."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, bool, Any]] = []

    def put(self, owner: Any, name: str, value: Any) -> None:
        """Replace an attribute of a module, a class or an object."""
        # What stands in the object itself, if it does: a class hands out its methods unbound.
        is_set = name in vars(owner)
        self._before.append((owner, name, is_set, vars(owner).get(name)))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Put everything back."""
        for owner, name, is_set, value in reversed(self._before):
            if is_set:
                setattr(owner, name, value)
            elif name in vars(owner):
                delattr(owner, name)
        self._before.clear()
