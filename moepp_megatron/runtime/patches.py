"""Every change that this package makes to another library's objects, and the only ways to make one.

The libraries stay unmodified on disk. What they offer no setting for is replaced in memory: for
good by `replace`, for a while by `replaced` or `Replacements`. Python's own hooks
(`sys.unraisablehook`, `threading.excepthook`) are made to be set and are none of them. Below, for
each module that does so (a test checks the sources): what it replaces, why, and until when.

runtime.cpu_support (torch, megatron-core): streams, events, device queries, random states,
    factories, uneven collectives, devices of gloo groups, torch.compile; for good, in a process
    without a GPU. Because megatron-core asks for CUDA where nothing depends on a GPU; until
    megatron-core trains on CPU ranks by itself.
runtime.agent (torch): SimpleElasticAgent._restart_workers; for good, in torchrun's own process.
    Because a user's error would be tried again; until torchrun has a setting for failures that are
    final.
training.checkpoint.save (megatron-core): filesystem_async._results_queue; for good. Because a
    server process would be started for a queue that nothing reads; until a save can be planned
    without a queue.
training.checkpoint.save (torch): storage_meta of one writer; for good. Because a path would be
    stored as an object, which another Python cannot unpickle; until torch stores no path.
training.checkpoint.data_only (megatron-core): FileSystemReader of its strategies; while a
    checkpoint is read. Because the index would be unpickled without restrictions; until
    megatron-core takes a reader for the common state.
training.setup (Transformer Engine): fuse_wgrad_accumulation of its layers; for good, where
    megatron-core has left it off. Because weight gradients would be written and added to their
    buffers in a pass of its own; until megatron-core's output layer can be built with its setting
    where apex is not there.
interop.vllm.model (vLLM): set_capture_fn of the router of one layer's FFN experts; for good.
    Because it would record rows of FFN experts where the gate records the picks of tokens; until
    vLLM captures only routers that ask for it.
interop.megatron_lm (Megatron-LM): checkpointing._maybe_setup_gpt_to_hybrid_load; for good, where
    its loop builds this package's model. Because it would translate the names of layers, or refuse
    a checkpoint without a pattern; until it looks at names instead of classes.
moe.stack (megatron-core): the numbers of layers of the first and the last stage in one
    TransformerConfig; while a model is built. Because HybridModel refuses them beside a pattern
    that has the stages; until HybridModel takes both.
training.step (megatron-core): prepare_grads and get_grad_norm of one optimizer; for one step.
    Because both would be computed twice where the norm is looked at before the step; until the
    optimizer's step takes a norm.
features.tasks.part (megatron-core): moe_expert_capacity_factor and moe_input_jitter_eps of the
    model's configuration, and the capacity of this package's routers; while tasks are evaluated.
    Because a token's score would depend on the other tokens, and on noise; until megatron-core
    limits and disturbs only in training.
training.resilience.stragglers (torch, megatron-core): collectives under every name, and Work.wait;
    while the clock runs. Because neither gloo nor NCCL says how long a rank waits; until torch
    reports the time of a collective.
training.setup (megatron-core): clip_grads.l2_norm_impl; for good, on a GPU without Transformer
    Engine and apex. Because the host waits for the device once a parameter; until megatron-core's
    own norm is one read.
features.profile.ranges (torch, megatron-core): methods of layers, process groups and Work; while a
    profile is recorded. Because parts of a layer have no names in a trace; never: names are this
    package's.
tools.bench.layer (megatron-core): methods of one layer; while it is timed. Because parts of a layer
    have no times; never: parts are this package's.
tools.bench.step (torch): all_to_all_single; in steps that are not timed. Because neither gloo nor
    NCCL reports how long it takes; until torch reports the time of a collective.
tools.bench.held_routing (megatron-core): gating, or the last step of it, of one router; for good,
    in a benchmark. Because timed layers must have the same load; never: it is the benchmark's
    purpose.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


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
